"""Inference with masked models: a copy that computes with its active weights alone."""

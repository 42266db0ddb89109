"""Weights in and out: state dicts and files that others read, and small ones of our own."""

"""Recipes: read from YAML and checked against the calls that they are the arguments of."""

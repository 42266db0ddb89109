"""Numbers about a sparse model: a table of its layers, and its FLOPs."""

"""Count: the active weights of a model, layer by layer, and its FLOPs."""

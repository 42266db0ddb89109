"""The menus: small functions of plain numbers or tensors, in which methods of papers differ."""

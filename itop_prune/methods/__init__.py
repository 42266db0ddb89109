"""The menus: small functions of plain numbers or plain tensors, by which methods of papers differ."""

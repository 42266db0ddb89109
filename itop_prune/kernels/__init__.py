"""Kernels of Numba for layers in sparse storage; they are imported at their first use."""

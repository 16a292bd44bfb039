"""Triton kernels of attention where one tile holds all queries and all keys of a head."""

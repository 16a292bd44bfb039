"""Triton kernels that score keys and choose among them."""

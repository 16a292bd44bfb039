"""Triton kernels of attention to blocks."""

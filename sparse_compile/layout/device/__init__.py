"""Layouts built on a GPU: the interval analysis printed as Triton kernels."""

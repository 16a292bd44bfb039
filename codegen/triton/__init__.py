"""Triton kernels, generated from specs."""

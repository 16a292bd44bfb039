"""Triton kernels that build layouts on the device."""

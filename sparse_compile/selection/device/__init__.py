"""Selecting on a GPU: kernels that choose blocks by their scores, and that score tokens."""

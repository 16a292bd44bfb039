"""Generated kernels for attention over selected keys."""

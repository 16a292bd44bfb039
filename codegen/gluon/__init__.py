"""Generated kernels in Gluon, for Hopper."""

"""Filling the holes of templates; see :mod:`sparse_compile.generated`."""

from sparse_compile.generated import fill

__all__ = ["fill"]

"""Filling the holes of templates; see :mod:`sparse_compile.codegen.runtime.generated`."""

from sparse_compile.codegen.runtime.generated import fill

__all__ = ["fill"]

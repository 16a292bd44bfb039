"""Learned and content-dependent masks: which keys are selected, and by what rule."""

from sparse_compile.selection.selection import Selection, canonical, transposed

__all__ = ["Selection", "canonical", "transposed"]

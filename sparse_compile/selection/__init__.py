"""Learned and content-dependent masks: which keys are selected, and by what rule."""

from sparse_compile.selection.checked import checked_select
from sparse_compile.selection.selection import (
    Selection,
    canonical,
    places,
    transposed,
    worklist,
)

__all__ = ["Selection", "canonical", "checked_select", "places", "transposed", "worklist"]

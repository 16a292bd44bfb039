"""Block layouts: which blocks of the score matrix a mask visits."""

from sparse_compile.layout.block_layout import EMPTY, FULL, PARTIAL, BlockLayout, BlockLists
from sparse_compile.layout.build import build_layout, packed_length
from sparse_compile.layout.density import density, mask_pairs
from sparse_compile.layout.picture import picture
from sparse_compile.layout.superset import Problem

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "BlockLayout",
    "BlockLists",
    "Problem",
    "build_layout",
    "density",
    "mask_pairs",
    "packed_length",
    "picture",
]

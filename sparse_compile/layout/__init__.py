"""Block layouts: which blocks of the score matrix a mask visits."""

from sparse_compile.layout.block_layout import EMPTY, FULL, PARTIAL, BlockLayout, BlockLists
from sparse_compile.layout.build import build_layout
from sparse_compile.layout.layout import Layout, build_views, mask_pairs
from sparse_compile.layout.lists import unpack
from sparse_compile.layout.picture import picture
from sparse_compile.layout.schedule import Schedule, make_schedule
from sparse_compile.layout.superset import Problem, ProblemShape

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "BlockLayout",
    "BlockLists",
    "Layout",
    "Problem",
    "ProblemShape",
    "Schedule",
    "build_layout",
    "build_views",
    "make_schedule",
    "mask_pairs",
    "picture",
    "unpack",
]

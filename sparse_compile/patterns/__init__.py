"""The mask algebra: patterns that name who may attend to whom, and how they combine.

>>> from sparse_compile import patterns as P
>>> P.SlidingWindow(512) & P.Causal() | P.Global(64)
((SlidingWindow(512) & Causal()) | Global(64))

A pattern is a value: it prints as what makes it, and compares by what it holds. Combine patterns
with ``&``, ``|`` and ``~``. Making one needs neither torch nor triton.
"""

from sparse_compile.patterns import presets
from sparse_compile.patterns.base import All, And, BoundMask, Heads, Not, Or, Pattern, Tables, heads
from sparse_compile.patterns.blocks import BigBird, BlockLocal, BlockSparse, Random
from sparse_compile.patterns.diffusion import BlockDiffusion
from sparse_compile.patterns.documents import Documents, Padding, PrefixLM
from sparse_compile.patterns.global_ import Global, Longformer
from sparse_compile.patterns.grids import Axial, Neighborhood, SlidingTile
from sparse_compile.patterns.learned import (
    DSA,
    NSA,
    MoBA,
    NSASelection,
    Quest,
    SeerAttention,
    XAttention,
)
from sparse_compile.patterns.local import Causal, Dilated, Fixed, SlidingWindow, Strided
from sparse_compile.patterns.packed import Packed
from sparse_compile.patterns.predicate import Predicate
from sparse_compile.patterns.scored import Scored, Threshold, TopK, TopP, TopRatio
from sparse_compile.patterns.scorers import (
    Antidiagonal,
    Compressed,
    Gate,
    Indexer,
    MeanPool,
    MinMax,
    OverlapPool,
    Scorer,
)
from sparse_compile.patterns.selecting import Selected, Selecting
from sparse_compile.patterns.trees import DraftTree, PrefixTree

__all__ = [
    "DSA",
    "NSA",
    "All",
    "And",
    "Antidiagonal",
    "Axial",
    "BigBird",
    "BlockDiffusion",
    "BlockLocal",
    "BlockSparse",
    "BoundMask",
    "Causal",
    "Compressed",
    "Dilated",
    "Documents",
    "DraftTree",
    "Fixed",
    "Gate",
    "Global",
    "Heads",
    "Indexer",
    "Longformer",
    "MeanPool",
    "MinMax",
    "MoBA",
    "NSASelection",
    "Neighborhood",
    "Not",
    "Or",
    "OverlapPool",
    "Packed",
    "Padding",
    "Pattern",
    "Predicate",
    "PrefixLM",
    "PrefixTree",
    "Quest",
    "Random",
    "Scored",
    "Scorer",
    "SeerAttention",
    "Selected",
    "Selecting",
    "SlidingTile",
    "SlidingWindow",
    "Strided",
    "Tables",
    "Threshold",
    "TopK",
    "TopP",
    "TopRatio",
    "XAttention",
    "heads",
    "presets",
]

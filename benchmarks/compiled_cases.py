"""Every pattern of the library, as a model would have it: written out in torch, and by name.

What content selects cannot be written out as a mask of positions: those patterns stand by name
alone, and the mask that they are checked against is what :func:`sparse_compile.select` selects.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import CASES, MaskMod, grid
from sparse_compile import patterns as P
from sparse_compile.selection import PooledGate

#: Exported beside the patterns: what they are made of, and the settings of a whole attention.
NO_MASKS = {
    *("BoundMask", "Pattern", "Scored", "Scorer", "Selecting", "Tables"),
    "NSA",  # its selection is here; native_sparse_attention() is in benchmarks.selected_peers
    "DraftTree",  # drafts are verified, never trained
}
UNIT = 64


@dataclass(frozen=True)
class Size:
    """Of a problem: tokens, heads and features of a head, and where it is."""

    n: int
    heads: int
    dim: int
    device: str

    def randn(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(*shape, device=self.device, generator=generator)


@dataclass(frozen=True)
class Case:
    """One pattern.

    Attributes:
        name: in commands and results.
        exports: names of ``sparse_compile.patterns`` that it shows.
        pattern: the pattern at a size.
        mask_mod: the same, written out in torch over (b, h, q, kv); None where content selects.
    """

    name: str
    exports: tuple[str, ...]
    pattern: Callable[[Size], P.Pattern]
    mask_mod: Callable[[Size], MaskMod] | None = None


_EXPORTS = {
    "causal": ("Causal",),
    "window": ("SlidingWindow",),
    "longformer": ("Or", "Global"),
    "bigbird": ("BigBird",),
    "fixed": ("Fixed",),
    "strided": ("Strided",),
    "dilated": ("Dilated",),
    "blocklocal": ("BlockLocal",),
    "axial": ("Axial",),
    "documents": ("Documents", "And"),
    "neighborhood": ("Neighborhood",),
    "prefix": ("PrefixLM",),
}


def _beside_peers(name: str) -> Case:
    """A mask that is also compared with other libraries."""
    case = CASES[name]
    return Case(
        name,
        _EXPORTS[name],
        lambda size: case.pattern(size.n, size.device),
        lambda size: case.mask_mod(size.n, size.device),
    )


def _plain(mask_mod: MaskMod) -> Callable[[Size], MaskMod]:
    return lambda size: mask_mod


def _random(size: Size) -> MaskMod:
    (drawn,) = P.Random(UNIT, 3, seed=0).bound().tables(size.device, size.n, size.n, 1, 1)
    return lambda b, h, q, kv: functools.reduce(
        torch.logical_or, [drawn[q // UNIT, i] == kv // UNIT for i in range(3)]
    )


def _lengths(size: Size) -> torch.Tensor:
    return torch.tensor([size.n * 3 // 4], device=size.device)


def _padding(size: Size) -> MaskMod:
    lengths = _lengths(size)
    return lambda b, h, q, kv: (kv <= q) & (kv < lengths[b])


def _blocks(size: Size) -> torch.Tensor:
    """bool [n / 64, n / 64]: each block of queries attends to itself and a tenth of the others."""
    count = -(-size.n // UNIT)
    drawn = size.randn(count, count) > 1.28
    return drawn | torch.eye(count, dtype=torch.bool, device=size.device)


def _block_sparse(size: Size) -> MaskMod:
    layout = _blocks(size)
    return lambda b, h, q, kv: layout[q // UNIT, kv // UNIT]


def _tiles(size: Size) -> MaskMod:
    """Tiles of 4 x 4 of a grid; each attends to the 3 x 3 around it, shifted at the border."""
    height, width = grid(size.n)

    def near(q: Any, kv: Any, count: int) -> Any:
        first = (q // 4 - 1).clamp(0, count // 4 - 3)
        return (first <= kv // 4) & (kv // 4 < first + 3)

    return lambda b, h, q, kv: (
        near(q // width, kv // width, height) & near(q % width, kv % width, width)
    )


def _near_or_even(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (abs(q - kv) < 9) | ((kv % 8 == 0) & (kv <= q))


def _two_kinds(size: Size) -> MaskMod:
    half = size.heads // 2

    def mask_mod(b: Any, h: Any, q: Any, kv: Any) -> Any:
        far = q - kv
        return (kv <= q) & (far < 256) & ((h < half) | (far < 32) | (far % 32 == 0))

    return mask_mod


def _segments(size: Size) -> tuple[list[int], list[int]]:
    """A prompt of a quarter of the tokens, and its continuations of a sixteenth each."""
    prompt, answer = size.n // 4, size.n // 16
    return [prompt, *[answer] * 12], [-1, *[0] * 8, *range(1, 5)]


def _tree(size: Size) -> P.PrefixTree:
    tree = P.PrefixTree.of_segments(*_segments(size))
    return P.PrefixTree(*(torch.tensor(t, device=size.device) for t in (tree.tout, tree.tin)))


def _tour(size: Size) -> MaskMod:
    tree = _tree(size)
    return lambda b, h, q, kv: (tree.tin[kv] <= tree.tin[q]) & (tree.tin[q] < tree.tout[kv])


def _starts(size: Size) -> torch.Tensor:
    return torch.arange(9, device=size.device) * size.n // 8


def _packed(size: Size) -> MaskMod:
    starts, places = _starts(size), torch.arange(size.n, device=size.device)
    sequence = torch.searchsorted(starts, places, right=True) - 1
    own = places - starts[sequence]
    return lambda b, h, q, kv: (
        (sequence[q] == sequence[kv]) & (kv <= q) & ((q - kv < 64) | (own[kv] < 4))
    )


def _diffusion(size: Size) -> MaskMod:
    half = size.n // 2

    def mask_mod(b: Any, h: Any, q: Any, kv: Any) -> Any:
        clean_q, clean_kv = q >= half, kv >= half
        row = torch.where(clean_q, (q - half) // UNIT, q // UNIT)
        column = torch.where(clean_kv, (kv - half) // UNIT, kv // UNIT)
        # Inductor on the CPU compiles no ==, which the authors write, of bools of positions.
        return (
            ((row == column) & ~(clean_q ^ clean_kv))
            | ((row > column) & clean_kv & ~clean_q)
            | ((row >= column) & clean_kv & clean_q)
        )

    return mask_mod


WRITTEN = (
    *map(_beside_peers, _EXPORTS),
    Case("all", ("All",), lambda size: P.All(), _plain(lambda b, h, q, kv: q * kv >= 0)),
    Case(
        "longformer-512",
        ("Longformer", "presets"),
        lambda size: P.presets.longformer_base_4096(),
        _plain(lambda b, h, q, kv: ((q - kv).abs() <= 256) | (q < 1) | (kv < 1)),
    ),
    Case("random", ("Random",), lambda size: P.Random(UNIT, 3, seed=0), _random),
    Case("padding", ("Padding",), lambda size: P.Padding(_lengths(size)) & P.Causal(), _padding),
    Case(
        "block-sparse", ("BlockSparse",), lambda size: P.BlockSparse(_blocks(size), UNIT),
        _block_sparse,
    ),
    Case("tiles", ("SlidingTile",), lambda size: P.SlidingTile(grid(size.n), 4, 3), _tiles),
    Case(
        "predicate", ("Predicate",), lambda size: P.Predicate(_near_or_even), _plain(_near_or_even)
    ),
    Case("prefix-tree", ("PrefixTree",), _tree, _tour),
    Case(
        "packed",
        ("Packed",),
        lambda size: P.Packed(_starts(size), P.presets.streaming_llm(64, 4)),
        _packed,
    ),
    Case("block-diffusion", ("BlockDiffusion",), lambda size: P.BlockDiffusion(UNIT), _diffusion),
    Case(
        "heads",
        ("Heads", "heads"),
        lambda size: P.SlidingWindow(255, 0)
        & P.heads([P.Causal(), P.Strided(32)], per=size.heads // 2),
        _two_kinds,
    ),
    Case(
        "not",
        ("Not",),
        lambda size: P.Causal() & ~P.BlockLocal(16),
        _plain(lambda b, h, q, kv: (kv <= q) & (q // 16 != kv // 16)),
    ),
)  # fmt: skip


def _chosen(name: str, exports: tuple[str, ...], rule: Callable[[Size], P.Pattern]) -> Case:
    return Case(name, exports, lambda size: P.Causal() & rule(size))


def _gate(size: Size, unit_q: int = 1) -> PooledGate:
    torch.manual_seed(0)
    heads = {"q_heads": size.heads, "kv_heads": size.heads}
    return PooledGate(size.dim, **heads, unit_q=unit_q, unit_kv=UNIT).to(size.device)


def _indexed(size: Size) -> P.Pattern:
    q, k = size.randn(1, 4, size.n, 32), size.randn(1, size.n, 32)
    return P.DSA(q, k, size.randn(1, size.n, 4), k=max(1, size.n // 16))


def _indexer(size: Size) -> P.Pattern:
    q, k = size.randn(1, 4, size.n, 32), size.randn(1, size.n, 32)
    return P.TopK(4, scorer=P.Indexer(q, k, size.randn(1, size.n, 4)), share="all")


def _compressed(size: Size) -> P.Pattern:
    keys = size.randn(1, size.heads, P.NSA().compressed(size.n), size.dim)
    return P.TopK(8, scorer=P.Compressed(keys), sink=1, local=2)


def _selected(size: Size) -> P.Pattern:
    """Each query selects its own unit and three of those before it."""
    own = torch.arange(size.n, device=size.device)[:, None] // UNIT
    before = torch.rand(size.n, 3, generator=torch.Generator().manual_seed(0)).to(size.device) * own
    index = torch.cat([before.to(torch.int32), own.to(torch.int32)], 1)
    return P.Selected(index.expand(1, size.heads, -1, -1), UNIT)


CHOSEN = (
    _chosen("top-k", ("TopK", "MeanPool"), lambda size: P.TopK(8, scorer=P.MeanPool(), local=2)),
    _chosen("top-ratio", ("TopRatio", "MinMax"), lambda size: P.TopRatio(0.1, scorer=P.MinMax())),
    _chosen("top-p", ("TopP", "OverlapPool"), lambda size: P.TopP(0.5, scorer=P.OverlapPool())),
    _chosen(
        "threshold",
        ("Threshold", "Antidiagonal"),
        lambda size: P.Threshold(
            1.0, unit_q=UNIT, scorer=P.Antidiagonal(), of="scores", diagonal=True
        ),
    ),
    _chosen(
        "seer-attention",
        ("SeerAttention",),
        lambda size: P.SeerAttention(_gate(size, UNIT), k=4),
    ),
    _chosen("gate", ("Gate",), lambda size: P.TopK(8, scorer=P.Gate(_gate(size)), local=1)),
    _chosen("moba", ("MoBA",), lambda size: P.MoBA(128, 3)),
    _chosen("quest", ("Quest",), lambda size: P.Quest(16)),
    _chosen("x-attention", ("XAttention",), lambda size: P.XAttention(threshold=0.5)),
    _chosen("nsa-selection", ("NSASelection",), lambda size: P.NSASelection(k=8)),
    _chosen("dsa", ("DSA",), _indexed),
    _chosen("indexer", ("Indexer",), _indexer),
    _chosen("compressed", ("Compressed",), _compressed),
    _chosen("selected", ("Selected",), _selected),
)
EVERY = {case.name: case for case in (*WRITTEN, *CHOSEN)}

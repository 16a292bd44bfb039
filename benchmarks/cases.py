"""The masks that are compared: each as a pattern and, written independently, for the peers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile import patterns as P

MaskMod = Callable[[Any, Any, Any, Any], Any]
WINDOW, DOCUMENT, PREFIX, NEIGHBOURS = 1024, 1024, 1024, 13
#: Of the 4K images (256 x 256 tokens) of Generalized Neighborhood Attention (arXiv 2504.16922).
WIDE = 80


@dataclass(frozen=True)
class Case:
    """One mask.

    Attributes:
        name: in commands and results.
        pattern: ``pattern(n, device)``, the mask as the library takes it.
        mask_mod: ``mask_mod(n, device)``, as FlexAttention takes it.
        fa4: arguments of FlashAttention-4 that say the same, or the name of one of
            :data:`benchmarks.fa4.MASK_MODS`; a sentence where there is neither.
        captured: what tensors the mask_mod captures.
        pairs: ``pairs(n)``, allowed pairs of one head, where a formula is easier than counting;
            n is a multiple of 128.
    """

    name: str
    pattern: Callable[[int, Any], P.Pattern]
    mask_mod: Callable[[int, Any], MaskMod]
    fa4: dict[str, Any] | str = "no mask_mod in CuTe is written for it"
    captured: str = "none"
    pairs: Callable[[int], int] | None = None


def grid(n: int) -> tuple[int, int]:
    """The sizes of the most square grid of ``n`` tokens whose width is a power of two.

    >>> grid(16384), grid(32768)
    ((128, 128), (256, 128))
    """
    width = 1 << (n.bit_length() - 1) // 2
    if n % width:
        raise ValueError(f"{n} tokens do not fill rows of {width}")
    return n // width, width


def documents(n: int, device: Any) -> Tensor:
    """The document of each token."""
    return torch.arange(n, dtype=torch.int32, device=device) // DOCUMENT


def _plain(mask_mod: MaskMod) -> Callable[[int, Any], MaskMod]:
    """A mask_mod that needs neither lengths nor tensors."""
    return lambda n, device: mask_mod


def _bigbird(n: int, device: Any) -> MaskMod:
    pattern = P.BigBird(64, random=3, global_=2, window=3)
    (chosen,) = pattern.bound().tables(device, n, n, 1, 1)

    def mask_mod(b: Any, h: Any, q: Any, kv: Any) -> Any:
        row, column = q // 64, kv // 64
        some = (chosen[row, 0] == column) | (chosen[row, 1] == column) | (chosen[row, 2] == column)
        return (row < 2) | (column < 2) | ((row - column).abs() <= 1) | some

    return mask_mod


def _axial(n: int, device: Any) -> MaskMod:
    _, width = grid(n)
    return lambda b, h, q, kv: (q // width == kv // width) | (q % width == kv % width)


def _documents(n: int, device: Any) -> MaskMod:
    ids = documents(n, device)
    return lambda b, h, q, kv: (q >= kv) & (ids[q] == ids[kv])


def _wide(n: int) -> tuple[int, int]:
    height, width = grid(n)
    return min(WIDE, height), min(WIDE, width)


def _neighborhood(window: int, n: int, device: Any) -> MaskMod:
    height, width = grid(n)

    def near(i: Any, j: Any, size: int) -> Any:
        width = min(window, size)
        first = (i - width // 2).clamp(0, size - width)
        return (first <= j) & (j < first + width)

    return lambda b, h, q, kv: (
        near(q // width, kv // width, height) & near(q % width, kv % width, width)
    )


def _later_blocks(n: int) -> int:
    """For every query the number of blocks of 128 before its own, summed."""
    blocks = n // 128
    return 128 * blocks * (blocks - 1) // 2


CASES = {
    case.name: case
    for case in (
        Case(
            "causal",
            lambda n, device: P.Causal(),
            _plain(lambda b, h, q, kv: q >= kv),
            {"causal": True},
            pairs=lambda n: n * (n + 1) // 2,
        ),
        Case(
            "window",
            lambda n, device: P.SlidingWindow(WINDOW - 1, 0),
            _plain(lambda b, h, q, kv: (q >= kv) & (q - kv < WINDOW)),
            {"window_size": (WINDOW - 1, 0)},
        ),
        Case(
            "longformer",
            lambda n, device: P.SlidingWindow(256) | P.Global(64),
            _plain(lambda b, h, q, kv: ((q - kv).abs() <= 256) | (q < 64) | (kv < 64)),
            "longformer",
        ),
        Case(
            "bigbird",
            lambda n, device: P.BigBird(64, random=3, global_=2, window=3),
            _bigbird,
            captured="int32 [n / 64, 3]: the random blocks",
        ),
        Case(
            "fixed",
            lambda n, device: P.Fixed(128, 8),
            _plain(lambda b, h, q, kv: (q >= kv) & ((q // 128 == kv // 128) | (kv % 128 >= 120))),
            pairs=lambda n: n * 129 // 2 + 8 * _later_blocks(n),
        ),
        Case(
            "strided",
            lambda n, device: P.Strided(128),
            _plain(lambda b, h, q, kv: (q >= kv) & ((q - kv < 128) | ((q - kv) % 128 == 0))),
            pairs=lambda n: n * 128 - 128 * 127 // 2 + _later_blocks(n),
        ),
        Case(
            "dilated",
            lambda n, device: P.Dilated(256, 4),
            _plain(lambda b, h, q, kv: ((q - kv).abs() <= 1024) & ((q - kv) % 4 == 0)),
            "dilated",
            # Each distance 4, 8, ... 1024 either way, and the query itself.
            pairs=lambda n: n + 2 * sum(n - 4 * i for i in range(1, 257)),
        ),
        Case(
            "blocklocal",
            lambda n, device: P.BlockLocal(512),
            _plain(lambda b, h, q, kv: q // 512 == kv // 512),
            "blocklocal",
        ),
        Case(
            "axial",
            lambda n, device: P.Axial(grid(n)),
            _axial,
            pairs=lambda n: n * (sum(grid(n)) - 1),
        ),
        Case(
            "documents",
            lambda n, device: P.Documents(documents(n, device)) & P.Causal(),
            _documents,
            "documents",
            captured="int32 [n]: the document of each token",
        ),
        Case(
            "neighborhood",
            lambda n, device: P.Neighborhood(grid(n), NEIGHBOURS),
            functools.partial(_neighborhood, NEIGHBOURS),
            pairs=lambda n: n * NEIGHBOURS**2,
        ),
        Case(
            "neighborhood-80",
            lambda n, device: P.Neighborhood(grid(n), _wide(n)),
            functools.partial(_neighborhood, WIDE),
            pairs=lambda n: n * math.prod(_wide(n)),
        ),
        Case(
            "prefix",
            lambda n, device: P.PrefixLM(PREFIX),
            _plain(lambda b, h, q, kv: (q >= kv) | (kv < PREFIX)),
            "prefix",
            pairs=lambda n: n * (n + 1) // 2 + PREFIX * (PREFIX - 1) // 2,
        ),
    )
}

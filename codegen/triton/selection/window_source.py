"""From a WindowSpec to the text of a Triton module that scores: same spec, same bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy

from sparse_compile.codegen.entry import Entry, Kernel, integers, number, pointers, sizes, strides
from sparse_compile.codegen.runtime.generated import fill
from sparse_compile.codegen.triton.filled import filled
from sparse_compile.codegen.triton.layout.key import Key, digest
from sparse_compile.codegen.triton.layout.source import data
from sparse_compile.codegen.triton.selection import window_text
from sparse_compile.codegen.triton.selection.source import verdict_lines, verdict_source
from sparse_compile.codegen.triton.tile import padded, power_of_two

#: Rows of a tile, queries with the heads of a list, at most.
ROWS = 128
#: Windows that the keys are padded to a multiple of: that of any tile.
PADDED = 128
#: The score of a block that gets nothing.
LEAST_SCORE = math.log(2.0**-126)
#: Architectures whose multiprocessors have more than 200 KiB of shared memory.
_LARGE = ("sm_90", "sm_100", "sm_103")


@dataclass(frozen=True)
class WindowSpec:
    """What a module is generated for; hashable.

    Attributes:
        key: the mask, in single queries and cells.
        heads: of a list.
        dim: of queries and keys.
        dtype: of both, "float16" or "bfloat16".
        parts: a key is the sum of so many of that dtype.
        span, per: cells of a window, and of a block.
        unit: consecutive queries whose shares are summed, if they are in one tile.
        logarithm: whether to store its logarithm, or the sum.
        arch: "sm_90" and the like, or "interpreter".
    """

    key: Key
    heads: int
    dim: int
    dtype: str
    parts: int
    span: int
    per: int
    unit: int
    logarithm: bool
    arch: str

    @property
    def name(self) -> str:
        """What the module is called."""
        shape = (self.heads, self.dim, self.dtype, self.parts, self.span, self.per, self.unit)
        described = ((*self.key.identity, self.key.span), shape, self.logarithm, self.arch)
        return f"window_scores_{digest(repr(described))}"

    @property
    def tokens(self) -> int:
        """Queries of a tile."""
        # Few heads leave many sums to hold, and many channels many of the query.
        rows = ROWS // 2 if self.heads <= 2 or self.dim > 128 else ROWS
        return max(1, rows // self.heads_pad)

    @property
    def summed(self) -> int:
        """Queries whose shares are summed: those of a unit, or of a tile if that is smaller."""
        return min(self.unit, self.tokens)

    @property
    def heads_pad(self) -> int:
        """A power of two."""
        return power_of_two(self.heads)

    @property
    def dim_pad(self) -> int:
        """Channels that are read of a key."""
        return padded(self.dim)

    @property
    def tile(self) -> int:
        """Windows of a tile."""
        return 128 if self.arch in _LARGE and self.dim_pad <= 128 else 64

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        deep = self.dim_pad <= 128 or self.arch in _LARGE
        return {"num_warps": 8, "num_stages": 2 if deep else 1}


def _entry(spec: WindowSpec) -> Entry:
    lines = (
        pointers(spec.dtype, "Q", "KEYS") + pointers("float32", "SCORES"),
        *strides("q"),
        integers("key_stride_part"),
        sizes("first", "rows") + number("factor") + sizes("windows", "padded", "blocks"),
        sizes("lists", "lists_per_key", "n_q", "n_kv"),
        sizes(*spec.key.sizes),
    )
    return Entry("window_scores", lines, spec.options)


def window_kernel(spec: WindowSpec) -> Kernel:
    """The module of a spec: the kernel ``window_scores``."""
    key, entry = spec.key, _entry(spec)
    header = filled(
        window_text.MODULE,
        spec,
        MASK=str(key.mask),
        STRIDE=str(key.kv.block),
        LEAST_SCORE=repr(LEAST_SCORE),
    )
    kernel = entry.text(
        window_text.KERNEL,
        SIZES=data(key),
        # The interpreter cannot multiply bf16.
        SINGLE=".to(tl.float32)" if spec.arch == "interpreter" else "",
    )
    return Kernel(spec.name, "".join([header, *_seen(key), kernel]), (entry,))


def _seen(key: Key) -> list[str]:
    """The functions ``sees``, ``sees_all`` and ``range_of_tiles``."""
    names, runs = data(key), ("TOKENS", "TILE + SPAN - 1")
    if key.mask.predicate == sympy.true:
        return [fill(window_text.ALL_SEEN, SIZES=names)]
    functions = fill(
        window_text.SEEN,
        SIZES=names,
        STRIDE=str(key.kv.block),
        VERDICT=verdict_lines(key, "token", "window + number"),
        WHOLE=verdict_lines(key, "base", "tile * TILE", runs),
        RANGE=verdict_lines(key, "base", "tile * TILE", runs),
    )
    return ["\n\n", *verdict_source(key), functions]

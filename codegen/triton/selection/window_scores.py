"""The kernel that scores blocks by the attention to keys of windows: its text, and its launch."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import sympy
import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_compile.codegen.entry import Entry, Kernel, integers, number, pointers, sizes
from sparse_compile.codegen.entry import strides as strides_of
from sparse_compile.codegen.runtime.generated import fill
from sparse_compile.codegen.runtime.launch import DTYPE_NAMES, strides
from sparse_compile.codegen.triton.filled import filled
from sparse_compile.codegen.triton.layout.key import LONGEST, Key, digest
from sparse_compile.codegen.triton.layout.source import data
from sparse_compile.codegen.triton.selection import printable, window_text
from sparse_compile.codegen.triton.tile import padded, power_of_two
from sparse_compile.selection.builders import Windows
from sparse_compile.spec.target import Target

#: Rows of a tile, queries with the heads of a list, at most.
ROWS = 128
#: Windows that the keys are padded to a multiple of: that of any tile.
PADDED = 128
#: The score of a block that gets nothing.
LEAST_SCORE = math.log(2.0**-126)
#: Architectures whose multiprocessors have more than 200 KiB of shared memory.
_LARGE = ("sm_90", "sm_100", "sm_103")
#: What the kernel holds of a key, of the heads of a list, and of the cells of windows and blocks.
_MOST_DIM, _MOST_HEADS, _MOST_SPAN, _MOST_PER = 256, ROWS, 16, 32
#: Verdicts are asked of so many runs of cells at once.
_SPAN = 256


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
        *strides_of("q"),
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
        VERDICT=printable.verdict_lines(key, "token", "window + number"),
        WHOLE=printable.verdict_lines(key, "base", "tile * TILE", runs),
        RANGE=printable.verdict_lines(key, "base", "tile * TILE", runs),
    )
    return ["\n\n", *printable.verdict_source(key), functions]


def fits(windows: Windows) -> bool:
    """Whether the kernel can score this: in its sizes and dtypes, by its masks."""
    q, keys, per = windows.q, windows.keys, windows.per
    small = q.shape[3] <= _MOST_DIM and windows.heads <= _MOST_HEADS
    small = small and windows.span <= _MOST_SPAN and per <= _MOST_PER and per & (per - 1) == 0
    small = small and max(q.shape[2], windows.visible.n_kv) <= LONGEST
    # Places in the keys of a head are int32.
    small = small and (keys.shape[2] + PADDED) * _MOST_DIM < 1 << 31
    divides = windows.lists % keys.shape[1] == 0 and q.shape[1] % windows.lists == 0
    # What is not made of fp16, or is scaled, may be too large for it.
    exact = q.dtype == torch.bfloat16
    exact = exact or (q.dtype == windows.made_of == torch.float16 and windows.scale > 0)
    some = min(q.numel(), keys.numel()) > 0
    return small and divides and exact and some and windows.visible.printable


@dataclass(frozen=True)
class WindowScores:
    """The kernel's scores of windows for which :func:`fits`."""

    windows: Windows

    @property
    def summed(self) -> int:
        """Queries of each row of scores: those of a unit, or fewer."""
        return self.spec.summed

    @functools.cached_property
    def spec(self) -> WindowSpec:
        """What the kernel is generated for that stores sums."""
        of, visible = self.windows, self.windows.visible
        key = replace(printable.key_of(visible, 1, visible.run_kv), span=_SPAN)
        of_heads = of.heads, of.q.shape[3], DTYPE_NAMES[of.q.dtype]
        shape = self.parts.shape[0], of.span, of.per, of.unit
        return WindowSpec(key, *of_heads, *shape, False, Target.of(of.q.device).arch)

    @functools.cached_property
    def parts(self) -> Tensor:
        """[parts, B, Hc, windows and more, channels and more]: what sums to the keys.

        Keys that are not of the dtype of the queries are rounded to two numbers of that dtype: of
        16 bits together for bf16, of 22 for fp16.
        """
        of = self.windows
        keys = of.keys if of.scale > 0 else of.keys.float() * of.scale
        room = -keys.shape[2] % PADDED
        channels = padded(keys.shape[3]) - keys.shape[3]
        keys = pad(keys, (0, channels, 0, room))
        if keys.dtype == of.q.dtype:
            return keys.contiguous()[None]
        keys = keys.float()
        high = keys.to(of.q.dtype)
        return torch.stack([high, (keys - high.float()).to(of.q.dtype)])

    def __call__(self, units: tuple[int, int], logarithm: bool) -> Tensor:
        """The attention that windows get from some units of queries, handed down to blocks.

        Args:
            units: the first, and the end.
            logarithm: whether to return the logarithm of the sums, at least that of the smallest
                normal number, or the sums.

        Returns:
            fp32 [B, lists, rows, blocks], in rows of :attr:`summed` queries.
        """
        windows, parts, visible = self.windows, self.parts, self.windows.visible
        spec = replace(self.spec, logarithm=logarithm)
        q = windows.q if windows.q.stride(-1) == 1 else windows.q.contiguous()
        first, rows = units[0] * windows.unit, (units[1] - units[0]) * windows.unit // self.summed
        least = LEAST_SCORE if logarithm else 0.0
        scores = torch.full(
            (q.shape[0], windows.lists, rows, windows.blocks), least, device=q.device
        )
        factor = windows.scale if windows.scale > 0 else 1.0
        values = {"Q": q, "KEYS": parts, "SCORES": scores, **strides(q=q), "first": first}
        values |= {"key_stride_part": parts.stride(0), "rows": rows, "factor": factor / math.log(2)}
        values |= {"windows": windows.keys.shape[2], "padded": parts.shape[3]}
        values |= {"blocks": windows.blocks, "lists": windows.lists}
        values |= {"lists_per_key": windows.lists // parts.shape[2], "n_q": q.shape[2]}
        values |= {"n_kv": visible.n_kv, **spec.key.values(visible.sizes)}
        grid = -(-rows * self.summed // spec.tokens), q.shape[0] * windows.lists
        printable.launch(window_kernel, spec, q.device, grid, values)
        return scores

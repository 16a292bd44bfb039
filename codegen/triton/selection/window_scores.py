"""Launch the kernel that scores blocks by the attention to keys of windows."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_compile.codegen.runtime.launch import DTYPE_NAMES, strides
from sparse_compile.codegen.triton.layout.key import LONGEST
from sparse_compile.codegen.triton.selection import window_source
from sparse_compile.codegen.triton.selection.printable import key_of, launch
from sparse_compile.codegen.triton.selection.window_source import WindowSpec
from sparse_compile.codegen.triton.tile import padded
from sparse_compile.selection.builders import Windows
from sparse_compile.spec.target import Target

#: What the kernel holds of a key, of the heads of a list, and of the cells of windows and blocks.
_MOST_DIM, _MOST_HEADS, _MOST_SPAN, _MOST_PER = 256, window_source.ROWS, 16, 32
#: Verdicts are asked of so many runs of cells at once.
_SPAN = 256


def fits(windows: Windows) -> bool:
    """Whether the kernel can score this: in its sizes and dtypes, by its masks."""
    q, keys, per = windows.q, windows.keys, windows.per
    small = q.shape[3] <= _MOST_DIM and windows.heads <= _MOST_HEADS
    small = small and windows.span <= _MOST_SPAN and per <= _MOST_PER and per & (per - 1) == 0
    small = small and max(q.shape[2], windows.visible.n_kv) <= LONGEST
    # Places in the keys of a head are int32.
    small = small and (keys.shape[2] + window_source.PADDED) * _MOST_DIM < 1 << 31
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
        key = replace(key_of(visible, 1, visible.run_kv), span=_SPAN)
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
        room = -keys.shape[2] % window_source.PADDED
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
        least = window_source.LEAST_SCORE if logarithm else 0.0
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
        launch(window_source.window_kernel, spec, q.device, grid, values)
        return scores

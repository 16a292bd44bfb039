"""Scores that are shares of an attention: OverlapPool, Compressed and Antidiagonal."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_compile.patterns.scorers import Antidiagonal, Compressed, OverlapPool
from sparse_compile.selection.builders import BUILDERS, WindowScores
from sparse_compile.selection.scores import in_units, parted, sizes_of_units, summed, unit_sums
from sparse_compile.selection.task import Scoring, Task
from sparse_compile.selection.visible import Visible
from sparse_compile.selection.windows import Windows


def _softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """The softmax over what is allowed; 0 for all where nothing is."""
    shares = logits.masked_fill(~allowed, -math.inf).softmax(-1)
    return shares.masked_fill(~allowed, 0)


def _log(mass: Tensor) -> Tensor:
    """The logarithm, at least that of the smallest normal number: only a mask excludes a block."""
    return mass.clamp(min=torch.finfo(mass.dtype).tiny).log()


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """[B, Hq, R, F] times [B, Hkv, C, F], heads grouped, as [B, Hq, R, C]."""
    grouped = parted(queries, -3, queries.shape[1] // keys.shape[1])
    return (grouped @ keys[:, :, None].mT).flatten(1, 2)


def _by_blocks(mass: Tensor, each: int, blocks: int) -> Tensor:
    """[..., C] as [..., blocks]: the sums of ``each`` neighbours."""
    missing = blocks * each - mass.shape[-1]
    return parted(pad(mass, (0, missing)), -1, each).sum(-1)


@dataclass(frozen=True, eq=False)
class _Windows(Scoring):
    """Attention to keys of overlapping windows.

    Attributes:
        of: what a kernel is asked for: lists of heads that have one key head.
    """

    of: Windows

    @functools.cached_property
    def _kernel(self) -> WindowScores | None:
        builder = BUILDERS.get(self.task.q.device)
        return builder.window_scores(self.of) if builder else None

    @property
    def width(self) -> int:
        task, of = self.task, self.of
        if self._kernel is not None:
            return of.lists * (of.unit // self._kernel.summed) * of.blocks
        return task.q.shape[1] * task.unit_q * -(-task.k.shape[2] // of.visible.run_kv)

    def __call__(self, first: int, end: int) -> Tensor:
        if self._kernel is None:
            return self._in_torch(first, end)
        parts = self.of.unit // self._kernel.summed
        # Whether the kernel sums over all heads of a list and all queries of a unit.
        finished = self.of.lists == self.lists and parts == 1
        scores = self._kernel((first, end), finished)
        return scores if finished else _log(unit_sums(summed(scores, self.lists), parts))

    def _in_torch(self, first: int, end: int) -> Tensor:
        task, of, rows = self.task, self.of, self.task.queries(first, end)
        logits = _products(task.q[:, :, rows].float() * of.scale, of.keys.float())
        mass = summed(_softmax(logits, self._seen(rows)), self.lists)
        mass = unit_sums(mass, task.unit_q)
        # A cell gets what the windows give that start at it, or up to span - 1 cells before.
        cells = pad(mass, (0, of.span - 1))
        for shift in range(1, of.span):
            cells = cells + pad(mass, (shift, of.span - 1 - shift))
        return _log(_by_blocks(cells[..., : of.per * of.blocks], of.per, of.blocks))

    def _seen(self, rows: slice) -> Tensor:
        """Which windows a query sees entirely: bool [B or 1, Hq or 1, rows, windows]."""
        windows, span = self.of.keys.shape[2], self.of.span
        cells = self.of.visible.verdict(rows.start, rows.stop)[0]
        # Cells beyond the end hide nothing.
        cells = pad(cells, (0, max(windows + span - 1 - cells.shape[-1], 0)), value=True)
        seen = cells[..., :windows]
        for shift in range(1, span):
            seen = seen & cells[..., shift : shift + windows]
        return seen


def _windows(
    scorer: OverlapPool | Compressed, task: Task, keys: Tensor, made_of: torch.dtype, scale: float
) -> Scoring:
    lists, stride = max(task.lists, keys.shape[1]), scorer.stride
    span, per = scorer.window // stride, task.block // stride
    of_queries = task.q, keys, scale, lists, task.unit_q
    visible = task.seen_in(1, stride)
    return _Windows(task, Windows(*of_queries, span, per, task.blocks, visible, made_of))


def by_windows(scorer: OverlapPool, task: Task) -> Scoring:
    """What the attention to means of windows gives to each block."""
    n, stride, span = task.k.shape[2], scorer.stride, scorer.window // scorer.stride
    windows = max(1, -(-(n - scorer.window) // stride) + 1)
    device = task.k.device
    sums = pad(unit_sums(task.k.float(), stride), (0, 0, 0, span))
    sizes = pad(sizes_of_units(n, stride, device), (0, 0, 0, span))
    total = sum(sums[:, :, i : i + windows] for i in range(span))
    count = sum(sizes[i : i + windows] for i in range(span))
    assert isinstance(total, Tensor)
    assert isinstance(count, Tensor)
    return _windows(scorer, task, total / count, task.k.dtype, task.scale)


def by_compressed(scorer: Compressed, task: Task) -> Scoring:
    """What the attention to given keys of windows gives to each block."""
    keys = scorer.keys.detach().to(task.k.device)
    scale = task.scale if scorer.scale is None else scorer.scale
    return _windows(scorer, task, keys, keys.dtype, scale)


@dataclass(frozen=True, eq=False)
class _Antidiagonals(Scoring):
    """Attention along antidiagonals.

    Attributes:
        stride: the side of the squares.
        keys: fp32 [B, Hkv, ceil(Nkv / stride), stride * D].
        visible: the mask, in those squares.
    """

    stride: int
    keys: Tensor
    visible: Visible

    @property
    def width(self) -> int:
        return self.task.q.shape[1] * (self.task.unit_q // self.stride) * self.keys.shape[2]

    def __call__(self, first: int, end: int) -> Tensor:
        task, rows = self.task, self.task.queries(first, end)
        # The last query of a square meets its first key.
        queries = _squares(task.q[:, :, rows], self.stride, reverse=True)
        logits = _products(queries * (task.scale / self.stride), self.keys)
        at = rows.start // self.stride
        seen = self.visible.verdict(at, at + queries.shape[2])[1]
        mass = summed(_softmax(logits, seen), self.lists)
        mass = _by_blocks(mass, task.block // self.stride, task.blocks)
        return _log(unit_sums(mass, task.unit_q // self.stride))


def _squares(tokens: Tensor, stride: int, reverse: bool) -> Tensor:
    """[B, H, n, D] as fp32 [B, H, ceil(n / stride), stride * D], zeros beyond the end."""
    parts = in_units(tokens.float(), -2, stride)
    return (parts.flip(3) if reverse else parts).flatten(3)


def by_antidiagonals(scorer: Antidiagonal, task: Task) -> Scoring:
    """What the attention along antidiagonals gives to each block."""
    stride = scorer.stride
    keys = _squares(task.k, stride, reverse=False)
    return _Antidiagonals(task, stride, keys, task.seen_in(stride, stride))

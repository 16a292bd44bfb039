"""Scores that are shares of an attention: OverlapPool, Compressed and Antidiagonal."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_compile.patterns.scorers import Antidiagonal, Compressed, OverlapPool
from sparse_compile.selection.builders import BUILDERS, Scoring, Task, Windows
from sparse_compile.selection.scores import in_units, products, sizes_of_units, summed, unit_sums


def _softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """The softmax over what is allowed; 0 for all where nothing is."""
    shares = logits.masked_fill(~allowed, -math.inf).softmax(-1)
    return shares.masked_fill(~allowed, 0)


def _log(mass: Tensor) -> Tensor:
    """The logarithm, at least that of the smallest normal number: only a mask excludes a block."""
    return mass.clamp(min=torch.finfo(mass.dtype).tiny).log()


def _by_blocks(mass: Tensor, each: int, blocks: int) -> Tensor:
    """[..., C] as [..., blocks]: the sums of ``each`` neighbours."""
    missing = blocks * each - mass.shape[-1]
    return torch.unflatten(pad(mass, (0, missing)), -1, (blocks, each)).sum(-1)


def by_windows(scorer: OverlapPool | Compressed, task: Task) -> Scoring:
    """What the attention to keys of overlapping windows gives to each block."""
    of, builder = windows_of(scorer, task), BUILDERS.get(task.q.device)
    kernel = builder.window_scores(of) if builder else None
    if kernel is None:
        width = task.q.shape[1] * task.unit_q * -(-task.k.shape[2] // scorer.stride)
        return Scoring(task, task.lists, width, functools.partial(_window_scores, task, of))
    parts = of.unit // kernel.summed
    # Whether the kernel sums over all heads of a list and all queries of a unit.
    finished = of.lists == task.lists and parts == 1

    def score(first: int, end: int) -> Tensor:
        scores = kernel((first, end), finished)
        return scores if finished else _log(unit_sums(summed(scores, task.lists), parts))

    return Scoring(task, task.lists, of.lists * parts * of.blocks, score)


def windows_of(scorer: OverlapPool | Compressed, task: Task) -> Windows:
    """What a kernel is asked for: lists of heads that have one key head."""
    if isinstance(scorer, Compressed):
        keys, made_of = scorer.keys.detach().to(task.k.device), scorer.keys.dtype
        scale = task.scale if scorer.scale is None else scorer.scale
    else:
        keys, made_of, scale = _means_of_windows(scorer, task.k), task.k.dtype, task.scale
    stride = scorer.stride
    lists, span, per = max(task.lists, keys.shape[1]), scorer.window // stride, task.block // stride
    of_queries = task.q, keys, scale, lists, task.unit_q
    return Windows(*of_queries, span, per, task.blocks, task.seen_in(1, stride), made_of)


def _means_of_windows(scorer: OverlapPool, k: Tensor) -> Tensor:
    """fp32 [B, Hkv, windows, D], the last of which may be short."""
    n, stride, span = k.shape[2], scorer.stride, scorer.window // scorer.stride
    windows = max(1, -(-(n - scorer.window) // stride) + 1)
    sums = pad(unit_sums(k.float(), stride), (0, 0, 0, span))
    sizes = pad(sizes_of_units(n, stride, k.device), (0, 0, 0, span))
    total = sums.unfold(2, span, 1)[:, :, :windows].sum(-1)
    return total / sizes.unfold(0, span, 1)[:windows].sum(-1)


def _window_scores(task: Task, of: Windows, first: int, end: int) -> Tensor:
    """The scores of some units where no kernel can."""
    rows = task.queries(first, end)
    logits = products(task.q[:, :, rows].float() * of.scale, of.keys.float())
    mass = unit_sums(summed(_softmax(logits, _seen(of, rows)), task.lists), task.unit_q)
    # A cell gets what the windows give that start at it, or up to span - 1 cells before.
    cells = pad(mass, (of.span - 1, of.span - 1)).unfold(-1, of.span, 1).sum(-1)
    return _log(_by_blocks(cells[..., : of.per * of.blocks], of.per, of.blocks))


def _seen(of: Windows, rows: slice) -> Tensor:
    """Which windows a query sees entirely: bool [B or 1, Hq or 1, rows, windows]."""
    windows, span = of.keys.shape[2], of.span
    cells = of.visible.verdict(rows.start, rows.stop)[0]
    # Cells beyond the end hide nothing.
    cells = pad(cells, (0, max(windows + span - 1 - cells.shape[-1], 0)), value=True)
    seen = cells[..., :windows]
    for shift in range(1, span):
        seen = seen & cells[..., shift : shift + windows]
    return seen


def by_antidiagonals(scorer: Antidiagonal, task: Task) -> Scoring:
    """What the attention along antidiagonals, of squares of a stride, gives to each block."""
    stride, each = scorer.stride, task.unit_q // scorer.stride
    keys, visible = _squares(task.k, stride, reverse=False), task.seen_in(stride, stride)

    def score(first: int, end: int) -> Tensor:
        rows = task.queries(first, end)
        # The last query of a square meets its first key.
        queries = _squares(task.q[:, :, rows], stride, reverse=True)
        logits = products(queries * (task.scale / stride), keys)
        at = rows.start // stride
        seen = visible.verdict(at, at + queries.shape[2])[1]
        mass = summed(_softmax(logits, seen), task.lists)
        return _log(unit_sums(_by_blocks(mass, task.block // stride, task.blocks), each))

    return Scoring(task, task.lists, task.q.shape[1] * each * keys.shape[2], score)


def _squares(tokens: Tensor, stride: int, reverse: bool) -> Tensor:
    """[B, H, n, D] as fp32 [B, H, ceil(n / stride), stride * D], zeros beyond the end."""
    parts = in_units(tokens.float(), -2, stride)
    return (parts.flip(3) if reverse else parts).flatten(3)

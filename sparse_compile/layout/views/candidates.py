"""The superset of a problem, laid out for classification on a device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.layout.superset import Digits, Problem, line_starts, rectangles, runs


@dataclass(frozen=True)
class Candidates:
    """The blocks that some class may visit, by rows and then by columns.

    With n candidates, R rows and C columns, lines ``0 .. R-1`` are rows and ``R .. R+C-1`` columns,
    and places ``0 .. n-1`` list the candidates by rows and ``n .. 2n-1`` by columns.

    Attributes:
        b, h: int64 [classes, 1]; the coordinates of each class.
        r, c: int64 [n]; the blocks, by rows.
        digits: bounds of the digits of the queries and keys of each block.
        whole: bool [n]; which blocks do not stick out.
        source: int64 [2n]; which candidate stands at each place.
        line: int64 [2n]; the line of each place.
        first: int64 [R+C+1]; the first place of each line.
        block: int32 [2n]; what a list holds at each place: c by rows, r by columns.
        row_start, col_start: int32 [R+1] and [C+1]; as in :class:`BlockLists`.
    """

    b: Tensor
    h: Tensor
    r: Tensor
    c: Tensor
    digits: Digits
    whole: Tensor
    source: Tensor
    line: Tensor
    first: Tensor
    block: Tensor
    row_start: Tensor
    col_start: Tensor

    @property
    def count(self) -> int:
        """n."""
        return self.r.numel()

    def to(self, device: torch.device) -> Candidates:
        """The same candidates on another device."""
        return Candidates(**{name: part.to(device) for name, part in vars(self).items()})


@functools.lru_cache(maxsize=64)
def candidates(problem: Problem, device: torch.device) -> Candidates:
    """The superset on ``device``; cached, so its tensors must not be changed."""
    if device.type != "cpu":
        return candidates(problem, torch.device("cpu")).to(device)
    rows, cols = problem.grid
    by_row = runs(rectangles(problem), cols, partial_first=False)
    r, c = torch.repeat_interleave(by_row.line, by_row.length), by_row.blocks().long()
    by_col = c.argsort(stable=True)
    row_start = line_starts(torch.bincount(r, minlength=rows))
    col_start = line_starts(torch.bincount(c, minlength=cols))
    number = torch.arange(problem.classes)[:, None]
    return Candidates(
        number // max(problem.heads, 1),
        number % max(problem.heads, 1),
        r,
        c,
        problem.digits(r, c),
        problem.whole(r, c),
        torch.cat([torch.arange(r.numel()), by_col]),
        torch.cat([r, c[by_col] + rows]),
        torch.cat([row_start[:-1], col_start + r.numel()]).long(),
        torch.cat([c, r[by_col]]).to(torch.int32),
        row_start,
        col_start,
    )

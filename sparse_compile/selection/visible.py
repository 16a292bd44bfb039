"""Visible: which runs of keys a static mask may, or must, show to runs of queries."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from sparse_compile.expr import KV, B, H, MaskExpr, Q
from sparse_compile.layout.intervals import Bound, Span
from sparse_compile.layout.superset import Digits, Problem, ProblemShape
from sparse_compile.layout.table_bounds import BlockBounds

#: The mask that hides nothing.
EVERYTHING = MaskExpr(sympy.true)
#: Runs of keys that are not worth dividing.
_FEW = 1024


@dataclass(frozen=True)
class Visible:
    """A mask in rectangles of ``run_q`` queries and ``run_kv`` keys.

    What a mask hides is proven by interval analysis, which never calls hidden what is not. Nothing
    here waits for the device.

    Attributes:
        mask: who may attend to whom.
        tables, sizes: what the mask reads.
        batch, heads, n_q, n_kv: of the problem; query heads.
        run_q, run_kv: consecutive queries and keys of a rectangle.
        device: where the tables are.
    """

    mask: MaskExpr
    tables: Sequence[Tensor]
    sizes: Sequence[int]
    batch: int
    heads: int
    n_q: int
    n_kv: int
    run_q: int
    run_kv: int
    device: torch.device

    @property
    def printable(self) -> bool:
        """Whether a kernel can tell from its text what the mask may show: it reads no tensor."""
        mask = self.mask
        return min(self.n_q, self.n_kv) < 1 or not (
            mask.tables or mask.depends_on(B) or mask.depends_on(H)
        )

    @functools.cached_property
    def _bounds(self) -> tuple[Problem, BlockBounds]:
        shape = ProblemShape(self.batch, self.heads, self.n_q, self.n_kv)
        problem = Problem.of(self.mask, shape, (self.run_q, self.run_kv), self.sizes)
        return problem, BlockBounds(problem, self.tables)

    def verdict(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Of the runs of queries ``first, ..., end - 1`` and all runs of keys, what is certain.

        Returns:
            two bool [B or 1, Hq or 1, end - first, runs of keys]: whether all pairs attend for
            certain, and whether some may.
        """
        columns = -(-self.n_kv // self.run_kv)
        problem, bounds = self._bounds
        r = torch.arange(first, end, device=self.device)[:, None]
        c = torch.arange(columns, device=self.device)
        b = torch.arange(problem.batches, device=self.device).view(-1, 1, 1, 1)
        h = torch.arange(problem.heads, device=self.device).view(-1, 1, 1)
        must, may = problem.verdict(
            problem.digits(r, c),
            Span(b, b, 0, problem.batches),
            Span(h, h, 0, problem.heads),
            functools.partial(bounds.lookup, {Q: r, KV: c}),
        )
        shape = (problem.batches, problem.heads, end - first, columns)
        return _spread(must, shape, self.device), _spread(may, shape, self.device)

    def columns(self, first: int, end: int) -> int:
        """So many runs of keys hold all that the runs ``first, ..., end - 1`` may see.

        For masks without tables. What is left out is a half of the keys, or three quarters, ...
        """
        columns = -(-self.n_kv // self.run_kv)
        queries = (first * self.run_q, min(end * self.run_q, self.n_q) - 1)
        return _columns(self._bounds[0], queries, columns)

    def may(self, first: int, end: int, lists: int) -> Tensor:
        """Whether some head of a list may attend: bool [B or 1, ``lists`` or 1, runs, runs]."""
        may = self.verdict(first, end)[1]
        if may.shape[1] == 1:
            return may
        return may.view(may.shape[0], lists, -1, *may.shape[2:]).any(2)


@functools.lru_cache(maxsize=4096)
def _columns(problem: Problem, queries: tuple[int, int], columns: int) -> int:
    """The columns of blocks that some queries may see, halved as often as that is certain."""
    run = problem.kv.block
    while columns > _FEW:
        half = 1 << (columns - 1).bit_length() - 1
        keys = (half * run, min(columns * run, problem.n_kv) - 1)
        if problem.verdict(Digits((queries,), (keys,)))[1]:
            break
        columns = half
    return columns


def _spread(truth: Bound, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if isinstance(truth, Tensor):
        return truth.expand(shape)
    return torch.full(shape, bool(truth), device=device)

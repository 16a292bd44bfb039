"""What a table can be over a block: minima and maxima of its entries, on its device."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import sympy
import torch
from torch import Tensor

from sparse_compile.expr import KV, B, FloorDiv, FloorMod, H, Q
from sparse_compile.layout.intervals import WIDE, Span, point, span
from sparse_compile.layout.superset import Problem
from sparse_compile.view import Order

_ARITHMETIC = (sympy.Add, sympy.Mul, sympy.Abs, sympy.Min, sympy.Max)


class BlockBounds:
    """Bounds of table lookups over the blocks of a layout; reads no value on the host.

    An index that is a function of one coordinate is bounded exactly: ``t0(b, kv // 64)`` by the
    entries that the keys of a block read. Any other index counts as the whole axis of the table.
    """

    def __init__(self, problem: Problem, tables: Sequence[Tensor]) -> None:
        """Tables ``t0, t1, ...`` of a problem, all on one device."""
        self.problem, self.tables = problem, tables
        self._reduced: dict[tuple[int, tuple[sympy.Expr, ...]], tuple[Tensor, Tensor]] = {}

    def lookup(
        self,
        blocks: Mapping[sympy.Symbol, Tensor],
        index: int,
        args: Sequence[Span],
        exprs: Sequence[sympy.Expr],
    ) -> Span:
        """The span of ``tables[index]`` at ``exprs``, whose own spans are ``args``.

        ``blocks[Q]`` and ``blocks[KV]`` are the int64 block numbers of each rectangle.
        """
        key = index, tuple(exprs)
        if key not in self._reduced:
            self._reduced[key] = self._reduce(*key)
        lo, hi = self._reduced[key]
        where = tuple(
            self._place(blocks, arg, expr, size)
            for arg, expr, size in zip(args, exprs, lo.shape, strict=True)
        )
        return Span(lo[where], hi[where], 1, _magnitude(self.tables[index].dtype))

    def _place(
        self, blocks: Mapping[sympy.Symbol, Tensor], arg: Span, expr: sympy.Expr, size: int
    ) -> Tensor | int:
        """Where in the reduced axis a rectangle reads."""
        axis = _axis(expr)
        if axis in (Q, KV):
            return blocks[axis]
        if axis is None:
            return 0
        if isinstance(arg.lo, Tensor):
            return (
                arg.lo if expr == B and size >= self.problem.batches else arg.lo.clamp(0, size - 1)
            )
        return max(0, min(arg.lo, size - 1))

    def _reduce(self, index: int, exprs: tuple[sympy.Expr, ...]) -> tuple[Tensor, Tensor]:
        lo = hi = self.tables[index]
        for dim, expr in enumerate(exprs):
            axis = _axis(expr)
            if axis in (Q, KV):
                lo, hi = self._per_block(axis, expr, lo, hi, dim)
            elif axis is None:
                lo, hi = lo.amin(dim, keepdim=True), hi.amax(dim, keepdim=True)
        return lo.to(torch.int64), hi.to(torch.int64)

    def _per_block(
        self, axis: sympy.Symbol, expr: sympy.Expr, lo: Tensor, hi: Tensor, dim: int
    ) -> tuple[Tensor, Tensor]:
        problem = self.problem
        length, order = (problem.n_q, problem.q) if axis == Q else (problem.n_kv, problem.kv)
        count, block = order.blocks(length), order.block
        if not (order.is_natural and expr == axis and lo.shape[dim] == length == count * block):
            # Tokens that do not exist count as a neighbour that does.
            tokens = tokens_of(order, length, lo.device).flatten()
            symbols = {axis.name: point(tokens, length), **problem.scalars()}
            # Over a rectangle of one token an interval is the value itself.
            read = span(expr, symbols).lo
            read = read if isinstance(read, Tensor) else torch.full_like(tokens, read)
            read = read.clamp(0, lo.shape[dim] - 1)
            both = lo is hi
            lo = lo.index_select(dim, read)
            hi = lo if both else hi.index_select(dim, read)
        shape = (*lo.shape[:dim], count, block, *lo.shape[dim + 1 :])
        if lo is hi:
            return torch.aminmax(lo.reshape(shape), dim=dim + 1)
        return lo.reshape(shape).amin(dim + 1), hi.reshape(shape).amax(dim + 1)


def _magnitude(dtype: torch.dtype) -> int:
    if dtype == torch.bool:
        return 1
    bits = torch.iinfo(dtype).bits
    return WIDE if bits == 64 else 1 << bits


@functools.lru_cache(maxsize=1024)
def _axis(expr: sympy.Expr) -> sympy.Symbol | None:
    """The coordinate that an index runs along: ``Q``, ``KV``, or ``B`` for a point of ``b, h``.

    None when the index cannot be evaluated exactly for each value of one coordinate.
    """
    if not all(_is_exact(node) for node in sympy.preorder_traversal(expr)):
        return None
    along = expr.free_symbols & {B, H, Q, KV}
    if along <= {B, H}:
        return B
    return along.pop() if len(along) == 1 else None


def _is_exact(node: sympy.Basic) -> bool:
    """Whether interval analysis evaluates this operator without loss on points."""
    if isinstance(node, (FloorDiv, FloorMod)):
        return not node.args[1].free_symbols & {B, H, Q, KV}
    return node.is_Symbol or node.is_Integer or isinstance(node, _ARITHMETIC)


@functools.lru_cache(maxsize=64)
def tokens_of(order: Order, n: int, device: torch.device) -> Tensor:
    """int64 [blocks, block]: the tokens of every block, those past the end as the block's first."""
    base = order.base(torch.arange(order.blocks(n)), n)[:, None]
    tokens = base + torch.tensor(order.offsets())
    return torch.where(tokens < n, tokens, base.clamp(max=n - 1)).to(device)

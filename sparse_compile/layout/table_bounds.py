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
from sparse_compile.spec.view import Order

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
        lo, hi = self.reduced_once(index, tuple(exprs))
        where = tuple(
            self._place(blocks, arg, expr, size)
            for arg, expr, size in zip(args, exprs, lo.shape, strict=True)
        )
        return Span(lo[where], hi[where], 1, magnitude_of(self.tables[index].dtype))

    def reduced_once(self, index: int, exprs: tuple[sympy.Expr, ...]) -> tuple[Tensor, Tensor]:
        """:meth:`reduced` as int64, kept."""
        key = index, exprs
        if key not in self._reduced:
            lo, hi = self.reduced(index, exprs)
            self._reduced[key] = lo.to(torch.int64), hi.to(torch.int64)
        return self._reduced[key]

    def of_squares(self, size: int) -> BlockBounds:
        """Bounds whose blocks are squares of ``size``, a power of two, of these."""
        return self if size == 1 else self._coarser.of_squares(size // 2)

    @functools.cached_property
    def _coarser(self) -> BlockBounds:
        return _Coarser(self)

    def _place(
        self, blocks: Mapping[sympy.Symbol, Tensor], arg: Span, expr: sympy.Expr, size: int
    ) -> Tensor | int:
        """Where in the reduced axis a rectangle reads."""
        axis = axis_of(expr)
        if axis in (Q, KV):
            return blocks[axis]
        if axis is None:
            return 0
        if isinstance(arg.lo, Tensor):
            return (
                arg.lo if expr == B and size >= self.problem.batches else arg.lo.clamp(0, size - 1)
            )
        return max(0, min(arg.lo, size - 1))

    def reduced(self, index: int, exprs: tuple[sympy.Expr, ...]) -> tuple[Tensor, Tensor]:
        """Least and greatest entries that a lookup reads, in the dtype of its table.

        An axis indexed along the queries or keys has one entry per block, one indexed by a point
        of ``b, h`` is as it was, any other has length 1.
        """
        lo = hi = self.tables[index]
        for dim, expr in enumerate(exprs):
            axis = axis_of(expr)
            if axis in (Q, KV):
                lo, hi = self._per_block(axis, expr, lo, hi, dim)
            elif axis is None:
                lo, hi = lo.amin(dim, keepdim=True), hi.amax(dim, keepdim=True)
        return lo, hi

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


class _Coarser(BlockBounds):
    """Bounds over pairs of the blocks of others."""

    def __init__(self, finer: BlockBounds) -> None:
        super().__init__(finer.problem, finer.tables)
        self.finer = finer

    def reduced(self, index: int, exprs: tuple[sympy.Expr, ...]) -> tuple[Tensor, Tensor]:
        lo, hi = self.finer.reduced_once(index, exprs)
        for dim, expr in enumerate(exprs):
            if axis_of(expr) in (Q, KV):
                lo, hi = _pairs(lo, dim).amin(dim + 1), _pairs(hi, dim).amax(dim + 1)
        return lo, hi


def _pairs(x: Tensor, dim: int) -> Tensor:
    """Adjacent entries along ``dim`` as an axis after it; a last one alone stands twice."""
    if x.shape[dim] % 2:
        x = torch.cat([x, x.narrow(dim, x.shape[dim] - 1, 1)], dim)
    shape = (*x.shape[:dim], x.shape[dim] // 2, 2, *x.shape[dim + 1 :])
    return x.reshape(shape)


def magnitude_of(dtype: torch.dtype) -> int:
    """No entry of a table of this dtype is larger."""
    if dtype == torch.bool:
        return 1
    bits = torch.iinfo(dtype).bits
    return WIDE if bits == 64 else 1 << bits


@functools.lru_cache(maxsize=1024)
def axis_of(expr: sympy.Expr) -> sympy.Symbol | None:
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

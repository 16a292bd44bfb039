"""The blocks that a mask could visit, whatever its tables hold, without visiting the others.

Rectangles of blocks are classified all at once by interval analysis, and only PARTIAL ones are
subdivided, so the cost follows the outline of the mask and never n². A large FULL rectangle stays
one rectangle until its blocks are listed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.expr import B, H, MaskExpr
from sparse_compile.expr.digits import digit_names
from sparse_compile.layout import extents
from sparse_compile.layout.block_layout import BlockLayout, BlockLists
from sparse_compile.layout.canonical import canonical_in
from sparse_compile.layout.extents import Side
from sparse_compile.layout.intervals import Bound, Lookup, Span, dtype_span, point, span
from sparse_compile.spec.view import Order, natural

#: Subdivision starts with about this many rectangles: fewer cost the same time in one launch.
_FIRST_RECTANGLES = 4096
#: A superset of more PARTIAL blocks is not listed; what the tables hold narrows it down first.
_NARROW = 1 << 15


@dataclass(frozen=True)
class Problem:
    """Everything known on the host that a layout depends on; hashable.

    Attributes:
        text: the mask, as :attr:`MaskExpr.text`.
        sizes: the values of ``s0, s1, ...``.
        batches, heads: the number of values that ``b`` and ``h`` take; 1 if the mask ignores them.
        n_q, n_kv: as in :class:`BlockLayout`.
        q, kv: how the tokens of each side are put into blocks.
    """

    text: str
    sizes: tuple[int, ...]
    batches: int
    heads: int
    n_q: int
    n_kv: int
    q: Order
    kv: Order

    @staticmethod
    def of(
        mask: MaskExpr,
        sizes: tuple[int, ...],
        batch: int,
        heads: int,
        lengths: tuple[int, int],
        blocks: tuple[int | Order, int | Order],
        listed: bool = False,
    ) -> Problem:
        """The problem of a call.

        Args:
            mask, sizes, batch, heads, lengths: of the call.
            blocks: how tokens are put into blocks; a number means runs of that many.
            listed: as in :class:`sparse_compile.spec.view.View`.
        """
        by_batch, by_head = (True, True) if listed else _class_coordinates(mask.text)
        batches, heads = batch if by_batch else 1, heads if by_head else 1
        q, kv = (natural(order) if isinstance(order, int) else order for order in blocks)
        return Problem(mask.text, sizes, batches, heads, *lengths, q, kv)

    @property
    def mask(self) -> MaskExpr:
        """The predicate."""
        return MaskExpr.parse(self.text)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of query blocks and of key blocks."""
        return self.q.blocks(self.n_q), self.kv.blocks(self.n_kv)

    @property
    def classes(self) -> int:
        """Number of (batch, head) classes."""
        return self.batches * self.heads

    @property
    def is_static(self) -> bool:
        """Whether the layout is known before any tensor is read, and the same for every class."""
        return self.classes == 1 and not self.mask.tables

    def layout(
        self, rows: BlockLists, columns: BlockLists | Callable[[], BlockLists]
    ) -> BlockLayout:
        """The layout of these lists."""
        shape = (self.n_q, self.n_kv, self.q, self.kv, self.batches, self.heads)
        return BlockLayout(*shape, rows, columns)

    def digits(self, r: Tensor, c: Tensor, size: int = 1) -> Digits:
        """The digits of the tokens in squares of ``size`` blocks at block (r, c)."""
        q = extents.cut(self.q, self.n_q, extents.digits(self.q, self.n_q, r, size))
        kv = extents.cut(self.kv, self.n_kv, extents.digits(self.kv, self.n_kv, c, size))
        return Digits(q, kv)

    def whole(self, r: Tensor, c: Tensor, size: int = 1) -> Tensor:
        """Which of these squares lie inside the lengths, no block sticking out."""
        whole_q = extents.whole(self.q, self.n_q, r, size)
        both = whole_q & extents.whole(self.kv, self.n_kv, c, size)
        assert isinstance(both, Tensor)
        return both

    def scalars(self) -> dict[str, Span]:
        """The spans of ``n_q``, ``n_kv`` and the sizes."""
        named = {"n_q": self.n_q, "n_kv": self.n_kv}
        named.update({f"s{i}": size for i, size in enumerate(self.sizes)})
        return {name: point(value) for name, value in named.items()}

    def verdict(
        self,
        digits: Digits,
        b: Span,
        h: Span,
        lookup: Lookup,
    ) -> tuple[Bound, Bound]:
        """Whether the predicate must and may hold in each square of :meth:`digits`."""
        symbols = {"b": b, "h": h, **self.scalars()}
        for axis, side, order, n in (
            ("q", digits.q, self.q, self.n_q),
            ("kv", digits.kv, self.kv, self.n_kv),
        ):
            # Lookups are indexed by tokens, everything else is in digits.
            low, high = (
                sum(end * stride for end, stride in zip(ends, order.strides, strict=True))
                for ends in zip(*side, strict=True)
            )
            symbols[axis] = Span(low, high, 1, n + order.strides[0])
            symbols |= {
                name: Span(lo, hi, 1, n + 1)
                for name, (lo, hi) in zip(digit_names(axis, len(side)), side, strict=True)
            }
        truth = span(canonical_in(self.mask.predicate, self.q, self.kv), symbols, lookup)
        return truth.lo, truth.hi


@dataclass(frozen=True)
class Digits:
    """Bounds of the digits of queries and keys in squares of blocks; int64 [n] each."""

    q: Side
    kv: Side

    def to(self, device: torch.device) -> Digits:
        """The same bounds on another device."""

        def moved(end: Bound) -> Bound:
            return end.to(device) if isinstance(end, Tensor) else end

        sides = (tuple((moved(lo), moved(hi)) for lo, hi in side) for side in (self.q, self.kv))
        return Digits(*sides)


@functools.lru_cache(maxsize=1024)
def _class_coordinates(text: str) -> tuple[bool, bool]:
    mask = MaskExpr.parse(text)
    return mask.depends_on(B), mask.depends_on(H)


@dataclass(frozen=True)
class Rectangles:
    """Non-empty rectangles of blocks, disjoint: ``[r0, r1) x [c0, c1)``; int64 [n] each.

    Attributes:
        r0, r1, c0, c1: the corners, in blocks.
        full: bool [n]; FULL, else a single PARTIAL block.
    """

    r0: Tensor
    r1: Tensor
    c0: Tensor
    c1: Tensor
    full: Tensor

    def transposed(self) -> Rectangles:
        """Rows and columns exchanged."""
        return Rectangles(self.c0, self.c1, self.r0, self.r1, self.full)


#: Which squares of ``size`` blocks at (r, c) are FULL and which PARTIAL, as bool [n] each.
Classify = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def rectangles(problem: Problem) -> Rectangles:
    """The superset of non-empty blocks, with ``b``, ``h`` and the tables abstract; on the CPU."""
    found = subdivided(problem, functools.partial(_classify, problem))
    assert found is not None
    return found


def subdivided(problem: Problem, classify: Classify, most: int | None = None) -> Rectangles | None:
    """The non-empty rectangles of a grid by subdividing the PARTIAL ones; on the CPU.

    Args:
        problem: whose grid.
        classify: what is known of squares.
        most: give up, and return None, beyond so many PARTIAL squares of one size.
    """
    rows, cols = problem.grid
    size = 1
    while -(-rows // size) * -(-cols // size) > _FIRST_RECTANGLES:
        size *= 2
    first = torch.cartesian_prod(torch.arange(0, rows, size), torch.arange(0, cols, size))
    r, c = first.unbind(1)
    found = []
    while True:
        full, partial = classify(r, c, size)
        found.append(_squares(r[full], c[full], size, True))
        r, c = r[partial], c[partial]
        if most is not None and r.numel() > most:
            return None
        if size == 1 or not r.numel():
            found.append(_squares(r, c, size, False))
            break
        size //= 2
        r, c = _children(problem, r, c, size)
    parts = zip(*(vars(part).values() for part in found), strict=True)
    return Rectangles(*(torch.cat(part) for part in parts))


@functools.lru_cache(maxsize=256)
def is_narrow(problem: Problem) -> bool:
    """Whether the superset is small enough to be listed and classified block by block."""
    return subdivided(problem, functools.partial(_classify, problem), _NARROW) is not None


def _classify(problem: Problem, r: Tensor, c: Tensor, size: int) -> tuple[Tensor, Tensor]:
    b = Span(0, problem.batches - 1, 1, problem.batches)
    h = Span(0, problem.heads - 1, 1, problem.heads)
    dtypes = problem.mask.tables
    must, may = problem.verdict(
        problem.digits(r, c, size), b, h, lambda index, *_: dtype_span(dtypes[index])
    )
    full = problem.whole(r, c, size) & must
    return full, torch.ones_like(full) & may & ~full


def _children(problem: Problem, r: Tensor, c: Tensor, size: int) -> tuple[Tensor, Tensor]:
    down, right = torch.tensor([0, 0, size, size]), torch.tensor([0, size, 0, size])
    r, c = (r[:, None] + down).flatten(), (c[:, None] + right).flatten()
    rows, cols = problem.grid
    exists = (r < rows) & (c < cols)
    return r[exists], c[exists]


def _squares(r: Tensor, c: Tensor, size: int, full: bool) -> Rectangles:
    # Large ones are FULL, so whole, so inside the grid.
    return Rectangles(r, r + size, c, c + size, torch.full_like(r, full, dtype=torch.bool))


@dataclass(frozen=True)
class Runs:
    """Consecutive blocks within a line, in order; int64 [n] each.

    Attributes:
        line: the line.
        first, length: the blocks ``first, ..., first + length - 1``.
        full: 1 for FULL, 0 for PARTIAL.
    """

    line: Tensor
    first: Tensor
    length: Tensor
    full: Tensor

    def blocks(self) -> Tensor:
        """int32: every block of every run, in order."""
        before = self.length.cumsum(0) - self.length
        shift = torch.repeat_interleave(self.first - before, self.length)
        return shift.add_(torch.arange(shift.numel())).to(torch.int32)


def runs(rects: Rectangles, n_across: int, partial_first: bool) -> Runs:
    """The rows of ``rects`` as runs: by line, then PARTIAL before FULL if asked, then by block."""
    height = rects.r1 - rects.r0
    of = torch.repeat_interleave(height)
    within = torch.arange(of.numel()) - (height.cumsum(0) - height)[of]
    line, first = rects.r0[of] + within, rects.c0[of]
    full = rects.full[of].long()
    key = line * 2 + full if partial_first else line
    order = (key * n_across + first).argsort()
    length = (rects.c1 - rects.c0)[of]
    return Runs(line[order], first[order], length[order], full[order])


def line_starts(counts: Tensor) -> Tensor:
    """int32 [lines + 1]: the running total of int64 [lines]."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def block_lists(rects: Rectangles, n_lines: int, n_across: int) -> BlockLists:
    """The lists of one class."""
    lines = runs(rects, n_across, partial_first=True)
    counts = torch.zeros(n_lines * 2, dtype=torch.int64)
    counts = counts.index_add_(0, lines.line * 2 + lines.full, lines.length).view(n_lines, 2)
    index = lines.blocks()
    return BlockLists(line_starts(counts.sum(1)), counts.to(torch.int32)[None], index[None])


@functools.lru_cache(maxsize=64)
def static_layout(problem: Problem, device: torch.device) -> BlockLayout:
    """The layout of a static mask; cached, so its tensors must not be changed."""
    if device.type != "cpu":
        return static_layout(problem, torch.device("cpu")).to(device)
    rects = rectangles(problem)
    rows, cols = problem.grid
    return problem.layout(
        block_lists(rects, rows, cols), block_lists(rects.transposed(), cols, rows)
    )

"""The blocks that a mask could visit, whatever its tables hold, without visiting the others.

Rectangles of blocks are classified all at once by interval analysis, and only PARTIAL ones are
subdivided, so the cost follows the outline of the mask and never n². A large FULL rectangle stays
one rectangle until its blocks are listed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.expr import B, H, MaskExpr
from sparse_compile.expr.digits import digit_names
from sparse_compile.layout import extents
from sparse_compile.layout.block_layout import BlockGrid, BlockLayout, BlockLists, Load, line_starts
from sparse_compile.layout.canonical import canonical_in
from sparse_compile.layout.extents import Side
from sparse_compile.layout.intervals import Bound, Lookup, Span, dtype_span, point, span
from sparse_compile.spec.view import Order, natural

#: Subdivision starts with about this many rectangles: fewer cost the same time in one launch.
_FIRST_RECTANGLES = 4096
#: A superset of more PARTIAL blocks is not listed; what the tables hold narrows it down first.
_NARROW = 1 << 15


class ProblemShape(NamedTuple):
    """Sizes of an attention, as far as its layout goes; ``heads`` counts query heads."""

    batch: int
    heads: int
    n_q: int
    n_kv: int


@dataclass(frozen=True)
class Problem(BlockGrid):
    """Everything known on the host that a layout depends on; hashable.

    Attributes:
        text: the mask, as :attr:`MaskExpr.text`.
        sizes: the values of ``s0, s1, ...``.
    """

    text: str
    sizes: tuple[int, ...]

    @staticmethod
    def of(
        mask: MaskExpr,
        shape: ProblemShape,
        blocks: tuple[int | Order, int | Order],
        sizes: Sequence[int] = (),
        listed: bool = False,
    ) -> Problem:
        """The problem of a call.

        Args:
            mask, shape, sizes: of the call.
            blocks: how tokens are put into blocks; a number means runs of that many.
            listed: as in :class:`sparse_compile.spec.view.View`.
        """
        by_batch, by_head = (True, True) if listed else _class_coordinates(mask.text)
        batches, heads = shape.batch if by_batch else 1, shape.heads if by_head else 1
        q, kv = (natural(order) if isinstance(order, int) else order for order in blocks)
        numbers = tuple(map(int, sizes))
        return Problem(shape.n_q, shape.n_kv, q, kv, batches, heads, mask.text, numbers)

    @property
    def mask(self) -> MaskExpr:
        """The predicate."""
        return MaskExpr.parse(self.text)

    @property
    def is_static(self) -> bool:
        """Whether the layout is known before any tensor is read, and the same for every class."""
        return self.classes == 1 and not self.mask.tables

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
        b: Span | None = None,
        h: Span | None = None,
        lookup: Lookup | None = None,
    ) -> tuple[Bound, Bound]:
        """Whether the predicate must and may hold in each square of :meth:`digits`.

        Args:
            digits: of the squares.
            b, h: of the classes; None: any.
            lookup: bounds of the tables; None: they can hold anything.
        """
        b = b or Span(0, self.batches - 1, 1, self.batches)
        h = h or Span(0, self.heads - 1, 1, self.heads)
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
        predicate = canonical_in(self.mask.predicate, self.q, self.kv)
        truth = span(predicate, symbols, lookup or self._any_entry)
        return truth.lo, truth.hi

    def _any_entry(self, index: int, *_: object) -> Span:
        return dtype_span(self.mask.tables[index])

    def classified(
        self,
        r: Tensor,
        c: Tensor,
        b: Span | None = None,
        h: Span | None = None,
        lookup: Lookup | None = None,
        size: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """bool: which squares of ``size`` blocks at block (r, c) are PARTIAL, and which FULL.

        Other arguments are as for :meth:`verdict`; the shape is that of its tensors together.
        """
        verdict = self.verdict(self.digits(r, c, size), b, h, lookup)
        return partial_and_full(self.whole(r, c, size), *verdict)


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


def partial_and_full(whole: Tensor, must: Bound, may: Bound) -> tuple[Tensor, Tensor]:
    """bool: which squares are PARTIAL, and which FULL.

    Args:
        whole: bool; which of them may count as FULL.
        must, may: whether the predicate must and may hold, see :meth:`Problem.verdict`.
    """
    full = whole & must
    return torch.ones_like(full) & may & ~full, full


#: Which squares of ``size`` blocks at (r, c) are PARTIAL and which FULL, as bool [n] each.
Classify = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def rectangles(problem: Problem, classify: Classify | None = None) -> Rectangles:
    """The non-empty blocks of a grid; arguments and result as of :func:`subdivided`."""
    found = subdivided(problem, classify)
    assert found is not None
    return found


def subdivided(
    problem: Problem, classify: Classify | None = None, most: int | None = None
) -> Rectangles | None:
    """The non-empty rectangles of a grid by subdividing the PARTIAL ones; on the CPU.

    Args:
        problem: whose grid.
        classify: what is known of squares; None: what holds for all classes and tables.
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
        partial, full = classify(r, c, size) if classify else problem.classified(r, c, size=size)
        found.append(_squares(r[full], c[full], size, True))
        r, c = r[partial], c[partial]
        if most is not None and r.numel() > most:
            return None
        if size == 1 or not r.numel():
            found.append(_squares(r, c, size, False))
            break
        size //= 2
        r, c = children(problem, size, r, c)
    parts = zip(*(vars(part).values() for part in found), strict=True)
    return Rectangles(*(torch.cat(part) for part in parts))


@functools.lru_cache(maxsize=256)
def is_narrow(problem: Problem) -> bool:
    """Whether the superset is small enough to be listed and classified block by block."""
    return subdivided(problem, most=_NARROW) is not None


def children(
    problem: Problem, size: int, r: Tensor, c: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    """The squares of ``size`` blocks in squares twice as large; ``others`` are kept for each."""
    down, right = torch.tensor([0, 0, size, size]), torch.tensor([0, size, 0, size])
    r, c = (r[:, None] + down).flatten(), (c[:, None] + right).flatten()
    rows, cols = problem.grid
    exists = (r < rows) & (c < cols)
    kept = (other.repeat_interleave(4) for other in others)
    return tuple(part[exists] for part in (r, c, *kept))


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


def layout_of_rectangles(problem: Problem, found: Sequence[Rectangles]) -> BlockLayout:
    """The layout of the rectangles of each class; on the CPU."""
    rows, cols = problem.grid
    turned = [rects.transposed() for rects in found]
    return problem.layout(_lists(found, rows, cols), _lists(turned, cols, rows))


def _lists(found: Sequence[Rectangles], n_lines: int, n_across: int) -> BlockLists:
    """The lists of all classes, each line with the room that its largest class needs."""
    lines = [runs(rects, n_across, partial_first=True) for rects in found]
    counts = torch.zeros(len(found), n_lines * 2, dtype=torch.int64)
    for c, run in enumerate(lines):
        counts[c].index_add_(0, run.line * 2 + run.full, run.length)
    counts = counts.view(len(found), n_lines, 2)
    totals = counts.sum(2)
    room = totals.amax(0) if len(found) else torch.zeros(n_lines, dtype=torch.int64)
    start = line_starts(room)
    index = torch.zeros(len(found), int(room.sum()), dtype=torch.int32)
    for c, run in enumerate(lines):
        line = torch.repeat_interleave(run.line, run.length)
        before = totals[c].cumsum(0) - totals[c]
        place = torch.arange(line.numel()) - before[line] + start.long()[line]
        index[c, place] = run.blocks()
    return BlockLists(start, counts.to(torch.int32), index, Load.of(room))


@functools.lru_cache(maxsize=64)
def static_layout(problem: Problem, device: torch.device) -> BlockLayout:
    """The layout of a static mask; cached, so its tensors must not be changed."""
    if device.type != "cpu":
        return static_layout(problem, torch.device("cpu")).to(device)
    return layout_of_rectangles(problem, [rectangles(problem)])

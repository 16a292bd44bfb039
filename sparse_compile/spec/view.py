"""View: part of a mask, with an order of queries and keys in which it is blockwise dense.

A token number is read as digits in a mixed radix, ``token = (d0 * r1 + d1) * r2 + d2``. An
:class:`Order` cuts the space of digits into boxes of equal shape; the tokens of one box are one
block. Every block holds the same offsets from its first token, so a kernel reads its rows through
strides, and nothing is copied. With radix 128, boxes of shape (64, 1) hold the tokens of one
residue class, (8, 8) eight columns of eight periods, and on a grid a square tile.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import sympy

from sparse_compile.expr import from_text, to_text
from sparse_compile.spec.json_text import tuples

Extent = tuple[int, int]


@dataclass(frozen=True)
class Order:
    """How the tokens of one side are put into blocks.

    Attributes:
        box: extent of a block along each digit, outermost digit first; the product is the number
            of tokens of a block. Along every digit but the first it divides the window.
        radices: sizes of the digits but the first, which is as large as the length needs.
        nesting: the digits in the order in which blocks are numbered, slowest first.
        windows: for each digit but the first, ``(lo, hi)``: only tokens with ``lo <= digit < hi``
            belong to a block.

    >>> Order((2, 1), (3,), (1, 0)).tokens(10)  # residue classes modulo 3, two tokens to a block
    [[0, 3], [6, 9], [1, 4], [7, 10], [2, 5], [8, 11]]
    """

    box: tuple[int, ...]
    radices: tuple[int, ...] = ()
    nesting: tuple[int, ...] = (0,)
    windows: tuple[Extent, ...] = ()

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", tuple((0, radix) for radix in self.radices))
        assert len(self.box) == len(self.radices) + 1 == len(self.windows) + 1
        assert sorted(self.nesting) == list(range(len(self.box)))
        for extent, (lo, hi) in zip(self.box[1:], self.windows, strict=True):
            assert (hi - lo) % extent == 0, "boxes must fill the window"

    @property
    def is_natural(self) -> bool:
        """Whether blocks are runs of consecutive tokens that cover all of them."""
        return not self.radices

    @property
    def is_complete(self) -> bool:
        """Whether every token belongs to a block."""
        return self.windows == tuple((0, radix) for radix in self.radices)

    @functools.cached_property
    def block(self) -> int:
        """Tokens per block."""
        return math.prod(self.box)

    @functools.cached_property
    def strides(self) -> tuple[int, ...]:
        """What one step of each digit adds to the token."""
        return tuple(math.prod(self.radices[k:]) for k in range(len(self.box)))

    def counts(self, n: Any) -> tuple[Any, ...]:
        """Boxes along each digit, for a sequence of ``n`` tokens; also of what prints as code."""
        first = -(-n // self.strides[0])
        inner = zip(self.windows, self.box[1:], strict=True)
        return (-(-first // self.box[0]), *((hi - lo) // extent for (lo, hi), extent in inner))

    def blocks(self, n: int) -> int:
        """Number of blocks of a sequence of ``n`` tokens."""
        if self.is_natural:
            return -(-n // self.box[0])
        return math.prod(self.counts(n))

    def digits_of(self, block: Any, n: int) -> list[Any]:
        """The first value of each digit in a block; for an int or an integer tensor."""
        counts, low = self.counts(n), [0, *(lo for lo, _ in self.windows)]
        digits: list[Any] = [None] * len(self.box)
        for position in reversed(range(len(self.nesting))):
            k = self.nesting[position]
            place = block if position == 0 else block % counts[k]
            digits[k] = low[k] + place * self.box[k]
            block = block // counts[k]
        return digits

    def base(self, block: Any, n: int) -> Any:
        """The first token of a block; for an int or an integer tensor."""
        digits = self.digits_of(block, n)
        return sum(digit * stride for digit, stride in zip(digits, self.strides, strict=True))

    def offsets(self) -> list[int]:
        """The tokens of any block, counted from its first one."""
        result = [0]
        for extent, stride in zip(self.box, self.strides, strict=True):
            result = [at + i * stride for at in result for i in range(extent)]
        return result

    def tokens(self, n: int) -> list[list[int]]:
        """The tokens of every block; numbers of ``n`` or more do not exist."""
        offsets = self.offsets()
        return [[self.base(b, n) + at for at in offsets] for b in range(self.blocks(n))]

    @property
    def fields(self) -> list[Any]:
        """What :meth:`of_fields` makes the order of; plain values for JSON."""
        return [self.box, self.radices, self.nesting, self.windows]

    @staticmethod
    def of_fields(fields: list[Any]) -> Order:
        """The order with these :attr:`fields`."""
        return Order(*tuples(fields))

    def __str__(self) -> str:
        if self.is_natural:
            return f"runs of {self.block}"
        names = [f"{extent}" for extent in self.box]
        kept = [
            f" in {lo}..{hi - 1}" if (lo, hi) != (0, radix) else ""
            for (lo, hi), radix in zip(self.windows, self.radices, strict=True)
        ]
        radix = ", ".join(f"{r}{k}" for r, k in zip(self.radices, kept, strict=True))
        return f"boxes of {' x '.join(names)} over radix {radix}"


def natural(block: int) -> Order:
    """Runs of ``block`` consecutive tokens."""
    return Order((block,))


@dataclass(frozen=True)
class View:
    """One of the disjoint parts of a mask, in the orders in which it is blockwise dense.

    Attributes:
        predicate: the part, as a predicate over tokens.
        q, kv: the orders of the queries and of the keys.
        listed: whether a selection names its blocks; then every batch entry and query head has
            lists of its own.
    """

    predicate: sympy.Basic
    q: Order
    kv: Order
    listed: bool = False

    @property
    def is_natural(self) -> bool:
        """Whether its blocks are runs of tokens."""
        return self.q.is_natural and self.kv.is_natural

    @property
    def fields(self) -> list[Any]:
        """What :meth:`of_fields` makes the view of; plain values for JSON."""
        return [to_text(self.predicate), self.q.fields, self.kv.fields, self.listed]

    @staticmethod
    def of_fields(fields: list[Any]) -> View:
        """The view with these :attr:`fields`."""
        text, q, kv, listed = fields
        return View(from_text(text), Order.of_fields(q), Order.of_fields(kv), listed)


@dataclass(frozen=True)
class Units:
    """One of the disjoint parts of a mask, whose keys a selection names in units.

    A query attends to a key that the list of its unit has *and* the predicate allows, see
    :class:`sparse_compile.selection.Selection`.

    Attributes:
        predicate: what is left of the mask among selected keys, over tokens.
        unit_q: consecutive queries that share a list.
        unit_kv: consecutive keys that are selected together.
    """

    predicate: sympy.Basic
    unit_q: int = 1
    unit_kv: int = 64

    @property
    def fields(self) -> list[Any]:
        """What :meth:`of_fields` makes the part of; plain values for JSON."""
        return [to_text(self.predicate), self.unit_q, self.unit_kv]

    @staticmethod
    def of_fields(fields: list[Any]) -> Units:
        """The part with these :attr:`fields`."""
        text, unit_q, unit_kv = fields
        return Units(from_text(text), unit_q, unit_kv)

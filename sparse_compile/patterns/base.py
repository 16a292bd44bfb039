"""Pattern, and how patterns combine: All, And, Or, Not, Heads.

A pattern is a value that names a predicate; it holds parameters only. Its one method that
subclasses write, :meth:`Pattern.predicate`, spells who may attend to whom as a sympy Boolean; the
dense definition, the block layout and the code of the kernels all follow from that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy

from sparse_compile.errors import PatternMisuse
from sparse_compile.expr.mask_expr import MaskExpr
from sparse_compile.expr.nodes import H, table
from sparse_compile.patterns import doors
from sparse_compile.patterns.checks import bad, runs, store, whole
from sparse_compile.patterns.data import dtype_of, is_tensor, key_of, on_device
from sparse_compile.patterns.parameters import Parameters

#: Makes the data of a table when it is needed: ``values(device, n_q, n_kv, batch, heads)``.
TableMaker = Callable[..., Any]


class Tables:
    """The tables that the predicate of a pattern reads, collected while it is spelled."""

    def __init__(self) -> None:
        self.makers: list[TableMaker] = []
        self.dtypes: list[str] = []
        self.fixed: list[bool] = []
        self._known: dict[Any, int] = {}

    def add(self, key: Any, dtype: str, make: TableMaker, fixed: bool = False) -> Any:
        """A table as a function of its coordinates; equal keys share one table.

        Args:
            key: hashable identity of the data.
            dtype: ``"bool"``, ``"int32"`` or ``"int64"``.
            make: ``make(device, n_q, n_kv, batch, heads)`` gives the tensor on ``device``.
            fixed: whether it gives the same for the same sizes, always: no tensor of the user's
                is read.
        """
        if key not in self._known:
            self._known[key] = len(self.makers)
            self.makers.append(make)
            self.fixed.append(fixed)
            self.dtypes.append(dtype)
        return table(self._known[key])

    def holding(self, value: Any, dtype: str | None = None) -> Any:
        """:meth:`add` of data that a pattern holds, a tensor or tuples of integers.

        The dtype of the table is that of the data, unless given.
        """
        dtype = dtype or dtype_of(value)
        fixed = not is_tensor(value)
        return self.add((dtype, key_of(value)), dtype, on_device(value, dtype), fixed)


@dataclass(frozen=True)
class BoundMask:
    """A pattern as the rest of the library reads it: a predicate, and how to make its tables.

    Attributes:
        expr: the predicate.
        makers: for each table ``t0, t1, ...``, what makes its tensor.
        fixed: for each whether sizes alone say what it holds, see :meth:`Tables.add`.
    """

    expr: MaskExpr
    makers: tuple[TableMaker, ...] = field(default=(), compare=False)
    fixed: tuple[bool, ...] = ()

    @staticmethod
    def of(predicate: sympy.Basic, tables: Tables) -> BoundMask:
        """A predicate with the tables that were collected for it."""
        expr = MaskExpr(predicate, tuple(tables.dtypes))
        return BoundMask(expr, tuple(tables.makers), tuple(tables.fixed))

    def trimmed(self) -> BoundMask:
        """The same without tables that the predicate does not read, the others numbered anew.

        Simplification may leave a table unread.
        """
        expr, used = self.expr.trimmed()
        makers, fixed = tuple(self.makers[i] for i in used), tuple(self.fixed[i] for i in used)
        return BoundMask(expr, makers, fixed)

    def tables(self, device: Any, n_q: int, n_kv: int, batch: int, heads: int) -> list[Any]:
        """The tensors of the tables on ``device``, for a problem of this size."""
        return [make(device, n_q, n_kv, batch, heads) for make in self.makers]


class Pattern(Parameters):
    """Base of all patterns. Combine them with ``&``, ``|`` and ``~``."""

    def predicate(self, tables: Tables) -> sympy.Basic:
        """The sympy Boolean over ``b, h, q, kv``, the lengths and tables of ``tables``."""
        raise NotImplementedError

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """Raise if the pattern does not fit a problem of this size; before anything runs."""

    def bound(self) -> BoundMask:
        """The predicate with its tables."""
        tables = Tables()
        return BoundMask.of(self.predicate(tables), tables)

    def dense(
        self, n_q: int, n_kv: int, batch: int = 1, heads: int = 1, device: Any = "cpu"
    ) -> Any:
        """The mask as a bool tensor [batch or 1, heads or 1, n_q, n_kv]; True may attend."""
        return doors.layouts().dense(self, n_q, n_kv, batch, heads, device)

    def layout(
        self,
        n_q: int,
        n_kv: int,
        block: tuple[int, int] | None = None,
        device: Any = None,
        batch: int = 1,
        heads: int = 1,
    ) -> Any:
        """The blocks that the pattern visits, as a :class:`sparse_compile.layout.Layout`."""
        return doors.layouts().layout(self, n_q, n_kv, block, device, batch, heads)

    def __and__(self, other: Pattern) -> Pattern:
        return And(self, _joins(self, "&", other))

    def __or__(self, other: Pattern) -> Pattern:
        return Or(self, _joins(self, "|", other))

    def __invert__(self) -> Pattern:
        return Not(self)

    def __bool__(self) -> bool:
        raise PatternMisuse(
            "sparse_compile: a pattern is neither true nor false, so `and`, `or` and `not` cannot "
            f"combine it. Write `&`, `|` and `~`, as in {self!r} & other."
        )


@dataclass(frozen=True, repr=False)
class All(Pattern):
    """Every query attends to every key.

    >>> All().dense(2, 3).int().tolist()
    [[[[1, 1, 1], [1, 1, 1]]]]
    """

    def predicate(self, tables: Tables) -> sympy.Basic:
        """Always true."""
        return sympy.true


@dataclass(frozen=True, repr=False, init=False)
class _Joined(Pattern):
    """Two patterns or more, joined by one operator; nested ones of the same kind are flattened."""

    parts: tuple[Pattern, ...]
    # Not annotated: these are no fields.
    operator, connective = "&", sympy.And

    def __init__(self, *parts: Pattern) -> None:
        name = type(self).__name__
        if len(parts) < 2:
            raise bad(f"{name} of {len(parts)} patterns", f"Write {name}(one, other).")
        for part in parts:
            _checked(name, part)
        flat = [inner for part in parts for inner in _parts_of(part, type(self))]
        store(self, parts=tuple(flat))

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """Each part must fit."""
        for part in self.parts:
            part.check(n_q, n_kv, batch, heads)

    def predicate(self, tables: Tables) -> sympy.Basic:
        """What the connective makes of those of the parts."""
        return self.connective(*(part.predicate(tables) for part in self.parts))

    def __repr__(self) -> str:
        return f"({f' {self.operator} '.join(map(repr, self.parts))})"


@dataclass(frozen=True, repr=False, init=False)
class And(_Joined):
    """Attention where all the parts allow it; what ``&`` makes.

    Args:
        parts: two patterns or more.

    >>> from sparse_compile import patterns as P
    >>> P.Causal() & P.SlidingWindow(128) & P.Global(4)
    (Causal() & SlidingWindow(128) & Global(4))
    """


@dataclass(frozen=True, repr=False, init=False)
class Or(_Joined):
    """Attention where one of the parts allows it; what ``|`` makes.

    Args:
        parts: two patterns or more.

    >>> from sparse_compile import patterns as P
    >>> P.SlidingWindow(128) | P.Global(4)
    (SlidingWindow(128) | Global(4))
    """

    operator, connective = "|", sympy.Or


@dataclass(frozen=True, repr=False)
class Not(Pattern):
    """Attention where ``part`` forbids it; what ``~`` makes.

    >>> from sparse_compile import patterns as P
    >>> ~P.Causal(), ~~P.Causal()
    (~Causal(), Causal())
    """

    part: Pattern

    def __post_init__(self) -> None:
        _checked("Not", self.part)

    def predicate(self, tables: Tables) -> sympy.Basic:
        """The negation of the part."""
        return sympy.Not(self.part.predicate(tables))

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """The part must fit."""
        self.part.check(n_q, n_kv, batch, heads)

    def __invert__(self) -> Pattern:
        return self.part

    def __repr__(self) -> str:
        return f"Not({self.part!r})" if isinstance(self.part, Not) else f"~{self.part!r}"


def _parts_of(part: Pattern, kind: type[_Joined]) -> tuple[Pattern, ...]:
    return part.parts if type(part) is kind else (part,)


def _checked(name: str, part: Any) -> None:
    if not isinstance(part, Pattern):
        raise PatternMisuse(
            f"sparse_compile: {name} of {part!r}, which is no pattern. "
            "Wrap a function of (b, h, q, kv) in Predicate(...)."
        )


def _joins(left: Pattern, operator: str, right: Any) -> Pattern:
    """What stands on the right of an operator, if it is a pattern."""
    if not isinstance(right, Pattern):
        raise PatternMisuse(
            f"sparse_compile: cannot combine {left!r} {operator} {right!r}: the right side is no "
            "pattern. Wrap a function of (b, h, q, kv) in Predicate(...)."
        )
    return right


@dataclass(frozen=True, repr=False)
class Heads(Pattern):
    """Query head ``h`` uses ``patterns[h // per]``.

    Args:
        patterns: one for each head, or for each group of ``per`` heads.
        per: how many neighbouring heads share a pattern.

    >>> from sparse_compile import patterns as P
    >>> P.Heads((P.All(), P.Causal())).dense(2, 2, heads=2).int().tolist()
    [[[[1, 1], [1, 1]], [[1, 0], [1, 1]]]]
    """

    patterns: tuple[Pattern, ...]
    per: int = 1

    def __post_init__(self) -> None:
        patterns = self.patterns
        if isinstance(patterns, Pattern) or not isinstance(patterns, Sequence) or not patterns:
            raise bad(f"heads({patterns!r}) needs a list of patterns", "Write one for each head.")
        for pattern in patterns:
            if not isinstance(pattern, Pattern):
                raise bad(
                    f"heads: {pattern!r} is no pattern",
                    "Wrap a function of (b, h, q, kv) in Predicate(...).",
                )
        store(self, patterns=tuple(patterns), per=whole("heads: per", self.per, 1))

    def __repr__(self) -> str:
        per = f", per={self.per}" if self.per > 1 else ""
        return f"heads([{', '.join(map(repr, self.patterns))}]{per})"

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """There must be a pattern for every head, and each must fit."""
        count = len(self.patterns)
        if count * self.per != heads:
            instead = f"Write {heads} patterns, one for each head."
            if heads % count == 0:
                instead = f"Write per={heads // count} to share each among {heads // count} heads."
            raise bad(
                f"heads: {count} patterns with per={self.per} are for {count * self.per} heads, "
                f"but there are {heads}",
                instead,
            )
        for pattern in dict.fromkeys(self.patterns):
            pattern.check(n_q, n_kv, batch, heads)

    def predicate(self, tables: Tables) -> sympy.Basic:
        """For each different pattern: it holds, and the head is one of its own."""
        places: dict[Pattern, list[int]] = {}
        for place, pattern in enumerate(self.patterns):
            places.setdefault(pattern, []).append(place)
        terms = []
        for pattern, mine in places.items():
            of_mine = sympy.Or(*(self._in_run(first, last) for first, last in runs(mine)))
            terms.append(sympy.And(of_mine, pattern.predicate(tables)))
        return sympy.Or(*terms)

    def _in_run(self, first: int, last: int) -> sympy.Basic:
        """Whether ``h`` belongs to a run of places of the list."""
        start, stop = first * self.per, (last + 1) * self.per
        # Heads below 0 or beyond the list do not exist.
        after = sympy.Ge(H, start) if first else sympy.true
        before = sympy.Lt(H, stop) if last + 1 < len(self.patterns) else sympy.true
        if start + 1 == stop and first:
            return sympy.Eq(H, start)
        return sympy.And(after, before)


def heads(patterns: Sequence[Pattern], per: int = 1) -> Heads:
    """A pattern for each head, or for each group of ``per`` neighbouring heads.

    >>> from sparse_compile import patterns as P
    >>> P.heads([P.Strided(128), P.SlidingWindow(256)], per=4)
    heads([Strided(128), SlidingWindow(256)], per=4)
    """
    return Heads(tuple(patterns) if isinstance(patterns, Sequence) else patterns, per)

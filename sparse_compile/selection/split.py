"""Split: a mask with a selection as a static part, and a part that holds where it selects.

With M(S) for a mask as a function of what its selection S chooses,

    M(S)  =  S & M(true)  |  ~S & M(false)            (Shannon's expansion)
          =  M(false)  |  S & (M(true) & ~M(false))   (S is under no ~, so M(false) implies M(true))

whose two terms are disjoint: each is attention of its own, and they merge by log-sum-exp.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import simplify_logic, to_nnf
from torch import Tensor

from sparse_compile.errors import PatternMisuse
from sparse_compile.expr import MaskExpr
from sparse_compile.patterns.base import All, And, BoundMask, Not, Or, Pattern, Tables
from sparse_compile.patterns.checks import bad, blocks
from sparse_compile.patterns.selecting import Selecting
from sparse_compile.selection.selection import Selection, canonical


@dataclass(frozen=True)
class Split:
    """A mask that selects, as two disjoint parts: ``static | leaf & selected``.

    Attributes:
        leaf: what selects.
        static: what holds whatever is selected; None if nothing does.
        selected: what else holds for selected keys; None if a selection adds nothing. It is also
            what the leaf selects among, so that it spends nothing on keys of the static part.
    """

    leaf: Selecting
    static: BoundMask | None
    selected: BoundMask | None


@dataclass(frozen=True, repr=False)
class Union(Selecting):
    """The units that one of ``parts`` selects; what ``|`` of selections runs as.

    Args:
        parts: two selections or more, of the same units.
    """

    parts: tuple[Selecting, ...]

    def __post_init__(self) -> None:
        if len({(part.unit_q, part.unit_kv) for part in self.parts}) > 1:
            units = ", ".join(f"{part!r} of {part.unit_q} x {part.unit_kv}" for part in self.parts)
            raise bad(
                f"an Or of selections in different units: {units} (queries x keys)",
                "Give all of them the same unit_q and unit_kv.",
            )
        object.__setattr__(self, "unit_q", self.parts[0].unit_q)
        object.__setattr__(self, "unit_kv", self.parts[0].unit_kv)

    def __repr__(self) -> str:
        return f"({' | '.join(map(repr, self.parts))})"

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """Each part must fit."""
        for part in self.parts:
            part.check(n_q, n_kv, batch, heads)

    def select(
        self, q: Tensor, k: Tensor, mask: MaskExpr, tables: list[Tensor], sizes: list[int]
    ) -> Selection:
        """All lists one after another, made ascending; as wide as all of them together."""
        found = [part.select(q, k, mask, tables, sizes) for part in self.parts]
        ended = [chosen.index.masked_fill(~chosen.used, -1) for chosen in found]
        lists = math.lcm(*(index.shape[1] for index in ended))
        listed = [index.repeat_interleave(lists // index.shape[1], 1) for index in ended]
        index, count = canonical(torch.cat(listed, -1), blocks(k.shape[2], self.unit_kv))
        return Selection(index, count, self.unit_q, self.unit_kv)


def selects(value: Any) -> bool:
    """Whether a pattern selects keys by content or by index.

    >>> from sparse_compile import patterns as P
    >>> selects(P.Causal() & P.Selected(((((0,),),),))), selects(P.Causal())
    (True, False)
    """
    return next(_leaves(value), None) is not None


def split(pattern: Pattern) -> Split:
    """The parts of a mask that selects.

    Raises:
        PatternMisuse, BadPattern: its selections cannot be split off: one stands under ``~`` or in
            ``heads``, or there are several that no ``|`` joins directly.

    >>> from sparse_compile import patterns as P
    >>> chosen = P.Selected(((((0, 2),),),), unit_q=8, unit_kv=4)
    >>> parts = split(P.Causal() & chosen)
    >>> parts.static, str(parts.selected.expr)
    (None, 'kv <= q')
    >>> parts = split(P.Causal() & (P.Global(4) | chosen))
    >>> str(parts.static.expr)
    '(kv <= q) & ((kv <= 3) | (q <= 3))'
    >>> str(parts.selected.expr)
    '(kv <= q) & (kv > 3) & (q > 3)'
    """
    pattern = _with_unions(pattern)
    leaves = list(dict.fromkeys(_checked_leaves(pattern, pattern, positive=True)))
    if len(leaves) != 1:
        raise PatternMisuse(
            f"sparse_compile: {pattern!r} has {len(leaves)} different selections: "
            f"{', '.join(map(repr, leaves))}. Join them by | where they stand, as in "
            "Causal() & (one | other), or attend in several calls."
        )
    tables = Tables()
    rest = without_selection(pattern)
    always = simplified(rest.predicate(tables))
    added = difference(_with(pattern, All()).predicate(tables), always)
    return Split(leaves[0], _bound(always, tables), _bound(added, tables))


def without_selection(pattern: Pattern) -> Pattern:
    """The mask where nothing is selected.

    >>> from sparse_compile import patterns as P
    >>> without_selection(P.Causal() & (P.Global(4) | P.Selected(((((0,),),),))))
    (Causal() & (Global(4) | ~All()))
    """
    return _with(pattern, Not(All()))


def _leaves(value: Any) -> Iterator[Selecting]:
    """The selections among the parts of a pattern, wherever they stand."""
    if isinstance(value, Selecting):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, Pattern):
        for part in vars(value).values():
            yield from _leaves(part)


def _with_unions(pattern: Pattern) -> Pattern:
    """The mask with the different selections of each Or as one."""
    if isinstance(pattern, (And, Or)):
        parts = [_with_unions(part) for part in pattern.parts]
        chosen = tuple(dict.fromkeys(part for part in parts if isinstance(part, Selecting)))
        if isinstance(pattern, Or) and len(chosen) > 1:
            parts = [part for part in parts if not isinstance(part, Selecting)]
            parts.append(Union(chosen))
        return type(pattern)(*parts) if len(parts) > 1 else parts[0]
    return Not(_with_unions(pattern.part)) if isinstance(pattern, Not) else pattern


def _checked_leaves(pattern: Pattern, whole: Pattern, positive: bool) -> Iterator[Selecting]:
    """The selections of a mask, each of which may stand under ``&`` and ``|`` only.

    Args:
        pattern: the part to look at.
        whole: the mask, for errors.
        positive: whether the part stands under an even number of ``~``.
    """
    if isinstance(pattern, Selecting):
        if not positive:
            raise bad(
                f"{whole!r} attends to what {pattern!r} does not select, which is not supported",
                "Select the keys to attend to, and combine selections by & and |.",
            )
        yield pattern
    elif isinstance(pattern, (And, Or)):
        for part in pattern.parts:
            yield from _checked_leaves(part, whole, positive)
    elif isinstance(pattern, Not):
        yield from _checked_leaves(pattern.part, whole, not positive)
    elif selects(pattern):
        raise bad(
            f"{next(_leaves(pattern))!r} stands inside {pattern!r}",
            "A selection is made for all heads at once: combine it by & and | outside of that, "
            "and give an index or a scorer that selects other keys for each head.",
        )


def _with(pattern: Pattern, value: Pattern) -> Pattern:
    """The mask with ``value`` in place of its selection."""
    if isinstance(pattern, Selecting):
        return value
    if isinstance(pattern, (And, Or)):
        return type(pattern)(*(_with(part, value) for part in pattern.parts))
    return Not(_with(pattern.part, value)) if isinstance(pattern, Not) else pattern


def _bound(predicate: sympy.Basic, tables: Tables) -> BoundMask | None:
    """The predicate with those of the tables that it reads; None if it is false."""
    if predicate == sympy.false:
        return None
    return BoundMask.of(predicate, tables).trimmed()


#: With more comparisons than this a predicate stays as it is: the search takes 2**n steps.
_MOST = 7
_CONNECTIVES = (sympy.And, sympy.Or, sympy.Not)


@functools.lru_cache(maxsize=256)
def simplified(predicate: sympy.Basic) -> sympy.Basic:
    """An equivalent predicate with as few comparisons, if there is a shorter one.

    >>> from sparse_compile.expr import KV, Q
    >>> near = Q - KV < 4
    >>> simplified(((KV <= Q) | (KV <= Q) & near) & ~((KV <= Q) & near))
    (kv <= q) & (-kv + q >= 4)
    """
    atoms: dict[sympy.Basic, sympy.Basic] = {}
    abstract = _abstract(predicate, atoms)
    names = {symbol: atom for atom, symbol in atoms.items() if isinstance(symbol, sympy.Symbol)}
    if not 1 < len(names) <= _MOST:
        return predicate
    forms = [simplify_logic(abstract, form) for form in ("cnf", "dnf")]
    spelled = operator.methodcaller("count", sympy.Symbol)
    best = min([abstract, *forms], key=spelled)
    return predicate if best is abstract else best.xreplace(names)


@functools.lru_cache(maxsize=256)
def difference(predicate: sympy.Basic, less: sympy.Basic) -> sympy.Basic:
    """Where ``predicate`` holds and ``less`` does not.

    >>> from sparse_compile.expr import KV, Q
    >>> difference((KV <= Q) & ((KV < 8) | (Q < 4)), (KV <= Q) & (KV < 8))
    (kv >= 8) & (kv <= q) & (q < 4)
    """
    if less == sympy.true:
        return sympy.false
    mine, other = sympy.And.make_args(predicate), sympy.And.make_args(less)
    if shared := [part for part in mine if part in other]:
        rest = (sympy.And(*(part for part in of if part not in shared)) for of in (mine, other))
        return sympy.And(*shared, difference(*rest))
    excluded = sympy.Or.make_args(less)
    left = sympy.Or(*(part for part in sympy.Or.make_args(predicate) if part not in excluded))
    return simplified(sympy.And(left, to_nnf(sympy.Not(less), simplify=False)))


def _abstract(predicate: sympy.Basic, atoms: dict[sympy.Basic, sympy.Basic]) -> sympy.Basic:
    """The predicate with symbols for what is no And, Or or Not; opposites share one."""
    if isinstance(predicate, _CONNECTIVES):
        return predicate.func(*(_abstract(arg, atoms) for arg in predicate.args))
    if predicate in (sympy.true, sympy.false):
        return predicate
    if predicate not in atoms:
        symbol = sympy.Dummy(f"a{len(atoms)}")
        atoms[predicate], atoms[sympy.Not(predicate)] = symbol, sympy.Not(symbol)
    return atoms[predicate]

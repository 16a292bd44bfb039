"""Score programs as Triton source: what a kernel does to a tile of scores before it masks them.

A kernel without a program works on raw products, and the scale is part of the exponent. With one,
``score`` is first brought to its natural units, then computed, and the exponent has its base alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from sparse_compile.codegen.triton.predicate import (
    Printed,
    helpers_in,
    named_terms,
    print_predicate,
    real_terms,
    subterms,
)
from sparse_compile.expr import COORDINATES, KV, MaskExpr, Q, ScoreProgram
from sparse_compile.spec import AttentionSpec

#: Stands for the distances ``kv - q`` of a tile, one after the other.
DISTANCE = sympy.Symbol("distance", integer=True)


@dataclass(frozen=True)
class PrintedScore:
    """A program as source lines; all empty where there is none.

    Attributes:
        factor: what turns a score into an exponent of 2.
        before: assignments that belong before the loop.
        value: lines that turn the products ``score`` of a tile into scores.
        slope: the same, and leave the derivatives in ``slope``, and in ``by_0, by_1, ...``; how far
            numbers are apart from their keys in ``apart_0, apart_1, ...``.
        coordinates: which of ``b, h, q, kv`` the lines read.
        by_distance: whether they read ``distance``, those of a tile.
        helpers: as in :class:`sparse_compile.codegen.triton.predicate.Printed`.
        shown: lines of a module's description.
    """

    factor: str = "scale * LOG2_E"
    before: tuple[str, ...] = ()
    value: tuple[str, ...] = ()
    slope: tuple[str, ...] = ()
    coordinates: frozenset[str] = frozenset()
    by_distance: bool = False
    helpers: frozenset[str] = frozenset()
    shown: tuple[str, ...] = ()

    @property
    def is_given(self) -> bool:
        """Whether there is a program."""
        return bool(self.value)

    @property
    def apply_slope(self) -> list[str]:
        """Lines that take the gradient of scores to that of their scaled products."""
        return ["grad_score *= slope"] if self.is_given else []


@dataclass(frozen=True)
class Scoring:
    """What becomes of the products of a tile: a score program, then the mask."""

    score: PrintedScore
    mask: Printed

    @staticmethod
    def of(
        attention: AttentionSpec,
        mask: MaskExpr,
        loop_axis: str,
        learned: bool = False,
        tiled: bool = False,
    ) -> Scoring:
        """For a kernel whose loop runs over ``loop_axis``, and what it covers of the mask.

        Args:
            learned: whether it is one that computes the gradients of learned tensors as well.
            tiled: whether its queries are neighbours in tokens, and its keys.
        """
        printed, program = print_predicate(mask, loop_axis), attention.score
        slopes = {"slope": program.derivative} if program else {}
        if learned and program:
            by = enumerate(program.lookups)
            slopes |= {f"by_{n}": program.derivative_by(lookup) for n, lookup in by}
            aparts = {f"apart_{n}": apart_of(lookup) for n, lookup in enumerate(program.lookups)}
            slopes |= {name: one.by for name, one in aparts.items() if one}
        score = print_score(program, mask.tables, loop_axis, printed, slopes, tiled)
        return Scoring(score, printed)

    @property
    def helpers(self) -> frozenset[str]:
        """As in :class:`sparse_compile.codegen.triton.predicate.Printed`."""
        return self.score.helpers | self.mask.helpers

    @property
    def reads_places(self) -> bool:
        """Whether it matters which query and key a score is of."""
        return bool(self.mask.keep or self.score.coordinates)

    @property
    def before(self) -> list[str]:
        """Assignments that belong before the loop."""
        return [*self.mask.before, *self.score.before]


def print_score(
    program: ScoreProgram | None,
    tables: Sequence[str],
    loop_axis: str,
    mask: Printed,
    slopes: Mapping[str, sympy.Expr],
    tiled: bool = False,
) -> PrintedScore:
    """Source of a program for a kernel whose loop runs over ``loop_axis`` (``"q"`` or ``"kv"``).

    Args:
        program: of the attention; None: its scores are the scaled products.
        tables: dtypes of its tables.
        loop_axis: ``"q"`` or ``"kv"``.
        mask: as it is printed in the same loop, whose names are taken.
        slopes: derivatives, by what they are called.
        tiled: whether what depends on distances alone is read once for each of a tile.

    >>> from sparse_compile.expr import softcap
    >>> capped, nothing = softcap(50.0), Printed((), (), "", frozenset())
    >>> printed = print_score(capped, (), "kv", nothing, {"slope": capped.derivative})
    >>> print("\\n".join(printed.slope))
    score *= scale
    s_0 = tanh(0.02 * score)
    slope = 1 - (s_0 * s_0)
    score = 50 * s_0
    """
    if program is None:
        return PrintedScore()
    named = _named(program, tables, loop_axis, mask, slopes, tiled)
    last = f"score = {named.value}"
    if program.absorbed:
        last = "score *= 0.0  # absorbed by what was added"
    alone = [line for line in named.inside if line.partition(" = ")[0] in named.needed]
    return PrintedScore(
        factor="LOG2_E",
        before=named.before,
        value=("score *= scale", *alone, last),
        slope=("score *= scale", *named.inside, *named.slopes, last),
        coordinates=named.coordinates,
        by_distance=named.by_distance,
        helpers=helpers_in(*named.before, *named.inside, *named.slopes, last),
        shown=(f"score    {program}",),
    )


@dataclass(frozen=True)
class _Named:
    """A program and its slopes, with lines for what they share and look up.

    Attributes:
        before, inside: these lines, before the loop and in it.
        value: the score.
        slopes: lines of the slopes.
        needed: names of lines that the score alone needs.
        coordinates: which of ``b, h, q, kv`` are read.
        by_distance: whether something is read once for each distance of a tile.
    """

    before: tuple[str, ...]
    inside: tuple[str, ...]
    value: str
    slopes: tuple[str, ...]
    needed: frozenset[str]
    coordinates: frozenset[str]
    by_distance: bool


def _named(
    program: ScoreProgram,
    tables: Sequence[str],
    loop_axis: str,
    mask: Printed,
    slopes: Mapping[str, sympy.Expr],
    tiled: bool,
) -> _Named:
    """For arguments of :func:`print_score`."""
    near = {one: f"near_{n}" for n, one in enumerate(filter(of_distance, program.lookups))}
    near = near if tiled else {}
    spread = {one: sympy.Symbol(name) for one, name in near.items()}
    exprs = [expr.xreplace(spread) for expr in (program.value, *slopes.values())]
    value, *found = real_terms(tables, *exprs)
    taken = [line.partition(" = ")[0] for line in (*mask.before, *mask.inside)]
    taken += near.values()
    distances, reads, read = _read_by_distance(tables, near, loop_axis, taken)
    before, inside, names = named_terms((value, *found), loop_axis, "s", [*taken, *read])
    pieces = {piece for root in (value, *found) for t in subterms(root) for piece in t.pieces}
    return _Named(
        (*distances, *before),
        (*reads, *inside),
        names.get(value, value.text(names)),
        tuple(
            f"{name} = {names.get(slope, slope.text(names))}"
            for name, slope in zip(slopes, found, strict=True)
        ),
        frozenset(names[term] for term in subterms(value) if term in names)
        | {*read, *near.values()},
        frozenset(c.name for c in COORDINATES if c.name in pieces),
        bool(near),
    )


def of_distance(lookup: sympy.Basic) -> bool:
    """Whether a lookup names queries and keys, and of them nothing but their distance."""
    if not {Q, KV} <= lookup.free_symbols:
        return False
    # Coordinates as the query and a distance: where the query is gone, that is all it names.
    return not any(sympy.expand(arg.xreplace({KV: KV + Q})).has(Q) for arg in lookup.args)


@dataclass(frozen=True)
class Apart:
    """Where the number of a key is, if not where the key is.

    Attributes:
        dim: the dimension of the tensor that keys index.
        by: how far behind the key.
    """

    dim: int
    by: sympy.Basic


@functools.lru_cache(maxsize=256)
def apart_of(lookup: sympy.Basic) -> Apart | None:
    """For a lookup that names keys but no queries: one index is a key and what it does not change.

    >>> from sparse_compile.expr import H, learned
    >>> apart_of(learned(0)(H, KV + 7))
    Apart(dim=1, by=7)
    >>> apart_of(learned(0)(H, KV)) is apart_of(learned(0)(H, 2 * KV)) is None
    True
    """
    dims = [d for d, arg in enumerate(lookup.args) if KV in arg.free_symbols]
    if Q in lookup.free_symbols or len(dims) != 1:
        return None
    by = sympy.expand(lookup.args[dims[0]] - KV)
    return None if by == 0 or KV in by.free_symbols else Apart(dims[0], by)


def _read_by_distance(
    tables: Sequence[str], near: Mapping[sympy.Basic, str], loop_axis: str, taken: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...], list[str]]:
    """Lines that read what depends on distances, for each of a tile, and spread it over the tile.

    Returns:
        those before the loop, those in it, and the names that they give.
    """
    first = {KV: DISTANCE, Q: sympy.Integer(0)}
    tile = "TILE_M, TILE_N" if loop_axis == "kv" else "TILE_N, TILE_M"
    terms = real_terms(tables, *(lookup.xreplace(first) for lookup in near)) if near else []
    before, inside, names = named_terms(terms, loop_axis, "s", taken)
    spread = [
        f"{name} = spread({names[term]}, {tile})"
        for term, name in zip(terms, near.values(), strict=True)
    ]
    return before, (*inside, *spread), list(names.values())

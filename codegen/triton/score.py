"""Score programs as Triton source: what a kernel does to a tile of scores before it masks them.

A kernel without a program works on raw products, and the scale is part of the exponent. With one,
``score`` is first brought to its natural units, then computed, and the exponent has its base alone.
"""

from __future__ import annotations

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
from sparse_compile.expr import COORDINATES, MaskExpr, ScoreProgram
from sparse_compile.spec import AttentionSpec


@dataclass(frozen=True)
class PrintedScore:
    """A program as source lines; all empty where there is none.

    Attributes:
        factor: what turns a score into an exponent of 2.
        before: assignments that belong before the loop.
        value: lines that turn the products ``score`` of a tile into scores.
        slope: the same, and leave the derivatives in ``slope``, and in ``by_0, by_1, ...``.
        coordinates: which of ``b, h, q, kv`` the lines read.
        helpers: as in :class:`sparse_compile.codegen.triton.predicate.Printed`.
        shown: lines of a module's description.
    """

    factor: str = "scale * LOG2_E"
    before: tuple[str, ...] = ()
    value: tuple[str, ...] = ()
    slope: tuple[str, ...] = ()
    coordinates: frozenset[str] = frozenset()
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
        attention: AttentionSpec, mask: MaskExpr, loop_axis: str, learned: bool = False
    ) -> Scoring:
        """For a kernel whose loop runs over ``loop_axis``, and what it covers of the mask.

        Args:
            learned: whether it is one that computes the gradients of learned tensors as well.
        """
        printed, program = print_predicate(mask, loop_axis), attention.score
        slopes = {"slope": program.derivative} if program else {}
        if learned and program:
            by = enumerate(program.lookups)
            slopes |= {f"by_{n}": program.derivative_by(lookup) for n, lookup in by}
        score = print_score(program, mask.tables, loop_axis, printed, slopes)
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
) -> PrintedScore:
    """Source of a program for a kernel whose loop runs over ``loop_axis`` (``"q"`` or ``"kv"``).

    Args:
        program: of the attention; None: its scores are the scaled products.
        tables: dtypes of its tables.
        loop_axis: ``"q"`` or ``"kv"``.
        mask: as it is printed in the same loop, whose names are taken.
        slopes: derivatives, by what they are called.

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
    value, *found = real_terms(tables, program.value, *slopes.values())
    taken = [line.partition(" = ")[0] for line in (*mask.before, *mask.inside)]
    before, inside, names = named_terms((value, *found), loop_axis, "s", taken)
    last = f"score = {names.get(value, value.text(names))}"
    if program.absorbed:
        last = "score *= 0.0  # absorbed by what was added"
    derivatives = [
        f"{name} = {names.get(slope, slope.text(names))}"
        for name, slope in zip(slopes, found, strict=True)
    ]
    needed = {names.get(term) for term in subterms(value)}
    alone = [line for line in inside if line.partition(" = ")[0] in needed]
    pieces = {piece for root in (value, *found) for t in subterms(root) for piece in t.pieces}
    return PrintedScore(
        factor="LOG2_E",
        before=before,
        value=("score *= scale", *alone, last),
        slope=("score *= scale", *inside, *derivatives, last),
        coordinates=frozenset(c.name for c in COORDINATES if c.name in pieces),
        helpers=helpers_in(*before, *inside, *derivatives, last),
        shown=(f"score    {program}",),
    )

"""NamedMask: a pattern as text that travels in a captured graph.

The text says all that a kernel is generated from; tensors that a pattern holds are found by key.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import sympy

from sparse_compile.expr import MaskExpr, ScoreProgram

#: Of what a call is made of. Graphs that were compiled for another one stay in caches on disk, and
#: this text is all that tells them apart: count on whenever that changes.
_VERSION = 2
#: In the place of the key of what selects: index and count are given; an index is given, of which
#: lists are made; the mask is a tensor, which is given.
LISTS, INDEX, TENSOR = "lists", "index", "tensor"
#: In the place of the key of what makes tables: they are given, and behind them the tensors that
#: the score program reads.
GIVEN = "given"


@dataclass(frozen=True)
class NamedPart:
    """A part of a mask.

    Attributes:
        mask: its predicate; reads all the tables that it has.
        key: of what makes its tables, see :func:`sparse_compile.sites.annotation.bound_mask_named`;
            empty where there are none; or :data:`GIVEN`.
    """

    mask: MaskExpr
    key: str = ""


@dataclass(frozen=True)
class NamedMask:
    """The mask of a call of attention.

    Attributes:
        static: what is attended to whatever is selected; None if nothing is.
        selected: who may attend to whom among what is selected; None where nothing is selected.
        selects: the key of what selects, or :data:`LISTS`, :data:`INDEX` or :data:`TENSOR`.
        units: consecutive queries, and keys, that are selected together.
        shown: what selects, in words.
        score: what happens to the scaled products of q and k before the mask; None: nothing.

    >>> from sparse_compile.expr import KV, Q
    >>> mask = NamedMask(NamedPart(MaskExpr(KV <= Q)))
    >>> NamedMask.parse(mask.text) == mask
    True
    """

    static: NamedPart | None
    selected: NamedPart | None = None
    selects: str = ""
    units: tuple[int, int] = (1, 1)
    shown: str = ""
    score: ScoreProgram | None = None

    @functools.cached_property
    def text(self) -> str:
        """The text that :meth:`parse` reads."""
        parts = [part and [part.mask.text, part.key] for part in (self.static, self.selected)]
        score = None if self.score is None else self.score.text
        fields = [_VERSION, *parts, self.selects, self.units, self.shown, score]
        return json.dumps(fields, separators=(",", ":"))

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> NamedMask:
        """The mask of a text."""
        _, static, selected, selects, units, shown, score = json.loads(text)
        program = None if score is None else ScoreProgram.parse(score)
        parts = _part(static), _part(selected)
        return NamedMask(*parts, selects, (units[0], units[1]), shown, program)


def _part(read: list[str] | None) -> NamedPart | None:
    return None if read is None else NamedPart(MaskExpr.parse(read[0]), read[1])


#: Everyone attends to everyone; and the mask is a tensor.
EVERYONE = NamedMask(NamedPart(MaskExpr(sympy.true)))
BY_TENSOR = NamedMask(None, selects=TENSOR)

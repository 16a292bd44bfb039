"""Idiom: a few lines of Python, as people write them, that a program is put together from."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Numbers:
    """Small constants of a piece of a program: ``{w}`` and the like in the text of its idiom."""

    w: int = 5
    d: int = 2
    g: int = 1
    c: int = 7


@dataclass(frozen=True)
class Idiom:
    """Lines of which the last is an expression; the others are statements before it.

    Attributes:
        text: over ``i`` and ``j``, the places of queries [NQ, 1] and keys [NK]; ``q``; ``s``, the
            scores; and ``keep``, the mask. ``{x}`` is what a step takes, in the axes of the scores.
        axes: those of ``"bhqk"`` along which the value varies. One of ``"qk"`` is [NQ, NK], any
            other has four axes.
        reads: the inputs that it reads, by the names in :data:`benchmarks.fuzz.inputs.INPUTS`.
        weight: how often it is drawn, beside others.
    """

    text: str
    axes: str = "qk"
    reads: tuple[str, ...] = ()
    weight: float = 1.0

    def lines(self, numbers: Numbers, **names: str) -> tuple[list[str], str]:
        """The statements and the expression, with numbers and names filled in."""
        *before, last = self.text.format(**vars(numbers), **names).strip("\n").split("\n")
        return before, last


@dataclass(frozen=True)
class Piece:
    """An idiom that was chosen, and its numbers."""

    name: str
    numbers: Numbers = field(default_factory=Numbers)

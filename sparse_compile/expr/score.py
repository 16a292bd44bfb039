"""ScoreProgram: what happens to a scaled product of q and k before the mask and the softmax.

Real arithmetic in floating point is not associative, so a program is never simplified: it is
computed as it was written, and so is its derivative.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy

from sparse_compile.expr.nodes import (
    COORDINATES,
    N_KV,
    N_Q,
    SCORE,
    is_learned,
    is_lookup,
    is_table,
    table_index,
)
from sparse_compile.expr.text import from_text, real_to_text

_KINKED = (sympy.Abs, sympy.Max, sympy.Min)


@dataclass(frozen=True)
class ScoreProgram:
    """A real-valued expression that takes the place of a score.

    Attributes:
        value: over ``score`` (the scaled product of a query and a key, dimensionless), the
            coordinates ``b, h, q, kv``, the lengths, run-time sizes and lookups, with
            ``tanh, exp, log, sqrt``, integer powers, ``Abs, Max, Min`` and ``Piecewise``.
        learned: the dtypes of the tensors ``w0, w1, ...`` that it reads, such as ``"float32"``;
            their number of dimensions is the number of index expressions in their lookups.
        absorbed: whether scores are 0 all the same, as of rows to which ``finfo.min`` was added:
            they count alike, and autograd follows the program.

    >>> softcap(50.0).value, softcap(50.0).derivative
    (50*tanh(score/50), 1 - tanh(score/50)**2)
    """

    value: sympy.Expr
    learned: tuple[str, ...] = ()
    absorbed: bool = False

    def __str__(self) -> str:
        return str(self.value)

    @functools.cached_property
    def text(self) -> str:
        """A stable one-line spelling; :meth:`parse` reads it back."""
        fields = [real_to_text(self.value), ",".join(self.learned), "absorbed" * self.absorbed]
        return "|".join(fields)

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> ScoreProgram:
        """The program that :attr:`text` spelled.

        >>> ScoreProgram.parse(softcap(0.3).text) == softcap(0.3)
        True
        """
        value, learned, absorbed = text.split("|")
        dtypes = tuple(name for name in learned.split(",") if name)
        return ScoreProgram(from_text(value), dtypes, bool(absorbed))

    def depends_on(self, symbol: sympy.Symbol) -> bool:
        """Whether the program mentions ``symbol``, such as one of ``B, H, Q, KV``."""
        return bool(self.value.has(symbol))

    @functools.cached_property
    def tables(self) -> frozenset[int]:
        """The numbers of the tables that it reads."""
        return frozenset(map(table_index, self.table_lookups))

    @functools.cached_property
    def table_lookups(self) -> tuple[sympy.Basic, ...]:
        """Every distinct lookup of a table, in a stable order."""
        found = {node for node in self.value.atoms(sympy.Function) if is_table(node)}
        return tuple(sorted(found, key=lambda node: (table_index(node), str(node))))

    @functools.cached_property
    def lookups(self) -> tuple[sympy.Basic, ...]:
        """Every distinct lookup of a real number, in a stable order."""
        found = {node for node in self.value.atoms(sympy.Function) if is_learned(node)}
        return tuple(sorted(found, key=lambda node: (table_index(node), str(node))))

    @functools.cached_property
    def derivative(self) -> sympy.Expr:
        """What a small change of ``score`` is multiplied by; where there is a kink, one side's."""
        return self.derivative_by(SCORE)

    @functools.lru_cache(maxsize=256)  # noqa: B019  # programs are few, and live as long
    def derivative_by(self, what: sympy.Expr) -> sympy.Expr:
        """What a small change of ``score``, or of what a lookup reads, is multiplied by.

        >>> from sparse_compile.expr.nodes import KV, learned
        >>> ScoreProgram(sympy.tanh(SCORE + 3 * learned(0)(KV))).derivative_by(learned(0)(KV))
        3 - 3*tanh(score + 3*w0(kv))**2
        """
        pieces = self.value.replace(
            lambda node: isinstance(node, _KINKED) and node.has(what),
            _pieces,
        )
        # A lookup is a number like any other: sympy need not look into it.
        lookups = {node: sympy.Dummy(real=True) for node in pieces.atoms(sympy.Function)}
        lookups = {node: name for node, name in lookups.items() if is_lookup(node)}
        plain = sympy.diff(pieces.xreplace(lookups), lookups.get(what, what))
        return plain.xreplace({name: node for node, name in lookups.items()})

    def __post_init__(self) -> None:
        known = {*COORDINATES, N_Q, N_KV, SCORE}
        unknown = {s.name for s in self.value.free_symbols - known if not _is_size(s)}
        if unknown:
            raise ValueError(f"ScoreProgram: unknown symbols {sorted(unknown)} in {self.value}")
        if any(is_lookup(node) and node.has(SCORE) for node in self.value.atoms(sympy.Function)):
            raise ValueError(f"ScoreProgram: a table is indexed by the score in {self.value}")


def _pieces(node: sympy.Expr) -> sympy.Expr:
    """A kinked function as pieces; the derivative of ``Abs`` at 0 is 0, as torch has it."""
    if not isinstance(node, sympy.Abs):
        return node.rewrite(sympy.Piecewise)
    (x,) = node.args
    return sympy.Piecewise((x, x > 0), (-x, x < 0), (0, True))


def _is_size(symbol: sympy.Symbol) -> bool:
    return bool(symbol.name[:1] == "s" and symbol.name[1:].isdigit())


def number(value: float) -> sympy.Number:
    """A constant, to the last bit; whole ones as integers, whose reciprocals cancel."""
    return sympy.Integer(int(value)) if float(value).is_integer() else sympy.Float(value)


def softcap(cap: float) -> ScoreProgram:
    """``cap * tanh(score / cap)``: scores stay between ``-cap`` and ``cap``, as in Gemma 2."""
    return ScoreProgram(number(cap) * sympy.tanh(SCORE / number(cap)))

"""Code: a bound that is not a number yet, but the text that will compute it in a kernel.

The interval analysis applies the same operators to tensors, ints and :class:`Code`. Applied to Code
they build a graph, which :func:`printed` writes as lines of Triton. Every Code knows on the host
between which numbers its value lies: so comparisons that are settled disappear, arithmetic stays
in int32 where it fits, and divisions round down without help where nothing is negative.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

from sparse_compile.layout.intervals import INT64_MAX, INT64_MIN, Abstract

INT32_MIN, INT32_MAX = -(1 << 31), (1 << 31) - 1
#: Values used once are written in place up to this many characters.
_LONGEST = 72
#: How the bounds that mean *anything* are spelled.
_NAMED = {INT64_MIN: "LEAST", INT64_MAX: "GREATEST"}


@dataclass(frozen=True, eq=False)
class Code(Abstract):
    """One value of a kernel.

    Attributes:
        pieces: literal text and operands, alternating as they come.
        low, high: the value is never outside, a fact known on the host. Both are 0 and 1 for a
            truth value.
        wide: whether it is int64; otherwise int32, or a truth value.
    """

    pieces: tuple[str | Code, ...]
    low: int
    high: int
    wide: bool = False

    @staticmethod
    def named(name: str, low: int, high: int) -> Code:
        """A variable or parameter."""
        return Code((name,), low, high, low < INT32_MIN or high > INT32_MAX)

    # Integers

    def __add__(self, other: Code | int) -> Code:
        if isinstance(other, int) and other == 0:
            return self
        low, high = limits(other)
        if isinstance(other, Code) and other.is_negated:
            return _arithmetic("-", self, _subtracted(other), self.low + low, self.high + high)
        if self.is_negated:
            return _arithmetic("-", other, _subtracted(self), self.low + low, self.high + high)
        return _arithmetic("+", self, other, self.low + low, self.high + high)

    def __sub__(self, other: Code | int) -> Code:
        if isinstance(other, int) and other == 0:
            return self
        low, high = limits(other)
        return _arithmetic("-", self, other, self.low - high, self.high - low)

    def __rsub__(self, other: int) -> Code:
        return _arithmetic("-", other, self, other - self.high, other - self.low)

    def __mul__(self, other: Code | int) -> Code | int:
        if isinstance(other, int) and other in (-1, 0, 1):
            return (0, self, -self)[other]
        corners = [x * y for x in (self.low, self.high) for y in limits(other)]
        return _arithmetic("*", self, other, min(corners), max(corners))

    __radd__, __rmul__ = __add__, __mul__

    @property
    def is_negated(self) -> bool:
        """Whether it is spelled ``-x``, and nothing can wrap around."""
        return isinstance(self.pieces[0], str) and self.pieces[0] == "-" and self.low > INT64_MIN

    def __neg__(self) -> Code:
        if self.is_negated:
            return _subtracted(self)
        low, high, wide = _fitted(-self.high, -self.low, self.wide)
        operand = _widened(self) if wide else self
        return Code(("-", *_operand(operand)), low, high, wide)

    def __floordiv__(self, other: Code | int) -> Code | int:
        least, most = limits(other)
        if least == most == 1:
            return self
        ends = [x // y for x in (self.low, self.high) for y in (least, most) if y > 0]
        size = max(abs(self.low), abs(self.high))
        low, high = (min(ends), max(ends)) if least > 0 else (-size, size)
        if low == high:
            return low
        # A shift rounds down, whatever the sign.
        shift = f" >> {other.bit_length() - 1}" if isinstance(other, int) else ""
        return self._divided(other, (" // ", shift, "floor_div("), low, high)

    def __mod__(self, other: Code | int) -> Code | int:
        least, most = limits(other)
        if least == most == 1:
            return 0
        if self.low >= 0 and self.high < least:
            return self
        size = max(abs(least), abs(most))
        low, high = (0, most - 1) if least > 0 else (-size, size)
        if self.low >= 0 and least > 0:
            high = min(high, self.high)
        masked = f" & {other - 1}" if isinstance(other, int) else ""
        return self._divided(other, (" % ", masked, "floor_mod("), low, high)

    def _divided(
        self, other: Code | int, spelled: tuple[str, str, str], low: int, high: int
    ) -> Code:
        """A division: of numbers that are not negative, by a power of two, and of any."""
        natural, by_bits, helper = spelled
        if isinstance(other, int) and other > 0 and other & (other - 1) == 0:
            pieces: tuple[str | Code, ...] = (*_operand(self), by_bits)
        elif self.low >= 0 and limits(other)[0] > 0:
            pieces = (*_operand(self), natural, *_operand(other))
        else:
            pieces = (helper, *_argument(self), ", ", *_argument(other), ")")
        return Code(pieces, *_fitted(low, high, self.wide or _is_wide(other)))

    def __rfloordiv__(self, other: int) -> Code | int:
        return Code.constant(other) // self

    def __rmod__(self, other: int) -> Code | int:
        return Code.constant(other) % self

    @staticmethod
    def constant(value: int) -> Code:
        """A number, as a value of a kernel."""
        return Code((_literal(value),), value, value, not INT32_MIN <= value <= INT32_MAX)

    @staticmethod
    def truth(value: bool) -> Code:
        """A settled truth value, as a value of a kernel."""
        return Code((f"tl.full([], {int(value)}, tl.int1)",), int(value), int(value))

    # Comparisons; a plain bool where the ranges settle them

    def __lt__(self, other: Code | int) -> Code | bool:
        low, high = limits(other)
        return _settled(self.high < low, self.low >= high, self, " < ", other)

    def __le__(self, other: Code | int) -> Code | bool:
        low, high = limits(other)
        return _settled(self.high <= low, self.low > high, self, " <= ", other)

    def __gt__(self, other: Code | int) -> Code | bool:
        low, high = limits(other)
        return _settled(self.low > high, self.high <= low, self, " > ", other)

    def __ge__(self, other: Code | int) -> Code | bool:
        low, high = limits(other)
        return _settled(self.low >= high, self.high < low, self, " >= ", other)

    def __eq__(self, other: object) -> Code | bool:  # type: ignore[override]
        assert isinstance(other, (Code, int))
        low, high = limits(other)
        same = self is other or self.low == self.high == low == high
        return _settled(same, self.high < low or self.low > high, self, " == ", other)

    __hash__ = None  # type: ignore[assignment]  # == makes code

    # Truth values

    def __and__(self, other: Code | bool) -> Code | bool:
        if isinstance(other, Code):
            return Code((*_operand(self), " & ", *_operand(other)), 0, 1)
        return self if other else False

    def __or__(self, other: Code | bool) -> Code | bool:
        if isinstance(other, Code):
            return Code((*_operand(self), " | ", *_operand(other)), 0, 1)
        return True if other else self

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> Code:
        # Not "~": the interpreter holds some truth values as numbers.
        return Code((*_operand(self), " == 0"), 0, 1)

    def __bool__(self) -> bool:
        raise TypeError("code has no truth value before it runs")

    # What the analysis asks for; one of the two is code, the other may be an int

    @staticmethod
    def least(a: Any, b: Any) -> Any:
        """The smaller one."""
        (a_low, a_high), (b_low, b_high) = limits(a), limits(b)
        if a is b or a_high <= b_low:
            return a
        if b_high <= a_low:
            return b
        return _call("tl.minimum(", a, b, min(a_low, b_low), min(a_high, b_high))

    @staticmethod
    def greatest(a: Any, b: Any) -> Any:
        """The larger one."""
        (a_low, a_high), (b_low, b_high) = limits(a), limits(b)
        if a is b or a_low >= b_high:
            return a
        if b_low >= a_high:
            return b
        return _call("tl.maximum(", a, b, max(a_low, b_low), max(a_high, b_high))

    @staticmethod
    def where(condition: Any, yes: Any, no: Any) -> Any:
        """``yes`` where the condition holds, else ``no``."""
        if yes is no or (isinstance(yes, int) and isinstance(no, int) and yes == no):
            return yes
        (y_low, y_high), (n_low, n_high) = limits(yes), limits(no)
        asked, if_so, if_not = map(_argument, (condition, yes, no))
        pieces = ("tl.where(", *asked, ", ", *if_so, ", ", *if_not, ")")
        wide = _is_wide(yes) or _is_wide(no)
        return Code(pieces, min(y_low, n_low), max(y_high, n_high), wide)


def variable(name: str, low: int, high: int) -> Any:
    """:meth:`Code.named`, for the analysis, which takes it for a tensor."""
    return Code.named(name, low, high)


def _call(name: str, a: Code | int, b: Code | int, low: int, high: int) -> Code:
    wide = _is_wide(a) or _is_wide(b)
    return Code((name, *_argument(a), ", ", *_argument(b), ")"), low, high, wide)


def limits(value: Code | int) -> tuple[int, int]:
    """The least and the greatest that a value can be."""
    return (value.low, value.high) if isinstance(value, Code) else (value, value)


def _is_wide(value: Code | int) -> bool:
    if isinstance(value, Code):
        return value.wide
    return not INT32_MIN <= value <= INT32_MAX


def _fitted(low: int, high: int, wide: bool) -> tuple[int, int, bool]:
    """The range and width of a result; one that may wrap around can be any int64."""
    if low < INT64_MIN or high > INT64_MAX:
        return INT64_MIN, INT64_MAX, True
    return low, high, wide or low < INT32_MIN or high > INT32_MAX


def _widened(value: Code) -> Code:
    if value.wide:
        return value
    return Code((value, ".to(tl.int64)"), value.low, value.high, True)


def _arithmetic(op: str, a: Code | int, b: Code | int, low: int, high: int) -> Code:
    low, high, wide = _fitted(low, high, _is_wide(a) or _is_wide(b))
    if wide and not (_is_wide(a) or _is_wide(b)):
        # The other operand follows.
        if isinstance(a, Code):
            a = _widened(a)
        elif isinstance(b, Code):
            b = _widened(b)
    return Code((*_operand(a), f" {op} ", *_operand(b)), low, high, wide)


def _subtracted(negated: Code) -> Code:
    """``x`` of ``-x``."""
    operand = negated.pieces[1]
    assert isinstance(operand, Code)
    return operand


def _settled(yes: bool, no: bool, a: Code, op: str, b: Code | int) -> Code | bool:
    if yes or no:
        return yes
    return Code((*_operand(a), op, *_operand(b)), 0, 1)


def _literal(value: int) -> str:
    return _NAMED.get(value) or str(value)


def _operand(value: Code | int) -> tuple[str | Code, ...]:
    if isinstance(value, int):
        return (_literal(value) if value >= 0 or value in _NAMED else f"({value})",)
    return (value,)


def _argument(value: Code | int) -> tuple[str | Code, ...]:
    return (value,) if isinstance(value, Code) else (_literal(value),)


def printed(results: dict[str, Code | int]) -> list[str]:
    """Lines that compute the results into variables of those names, shared values only once.

    >>> x = Code.named("x", 0, 100)
    >>> y = x // 7
    >>> printed({"low": Code.least(y, 3), "sum": y + x * 2 + (x - 50) // 7})
    ['x0 = x // 7', 'low = tl.minimum(x0, 3)', 'sum = (x0 + (x * 2)) + floor_div(x - 50, 7)']
    """
    return _Printer(results).lines


def _as_code(value: Code | int) -> Code:
    if isinstance(value, Code):
        return value
    return Code.truth(value) if isinstance(value, bool) else Code.constant(value)


class _Printer:
    """Numbers the distinct values of a graph, counts their uses, and writes them in order."""

    def __init__(self, results: dict[str, Code | int]) -> None:
        self.keys: dict[tuple[str | int, ...], int] = {}
        self.seen: dict[int, int] = {}
        self.nodes: list[tuple[str | int, ...]] = []
        self.texts: dict[int, str] = {}
        self.lines: list[str] = []
        self.temporaries = itertools.count()
        codes = {name: _as_code(result) for name, result in results.items()}
        roots = {name: self._number(code) for name, code in codes.items()}
        self.uses = Counter(piece for node in self.nodes for piece in node)
        names = {root: name for name, root in reversed(roots.items()) if len(self.nodes[root]) > 1}
        for number in range(len(self.nodes)):
            self._write(number, names.get(number))
        for name, root in roots.items():
            if names.get(root) != name:
                self.lines.append(f"{name} = {self.texts[root]}")

    def _number(self, value: Code) -> int:
        """The number of a value; equal texts are one value, operands come before their users."""
        if id(value) not in self.seen:
            pieces = (p if isinstance(p, str) else self._number(p) for p in value.pieces)
            key = tuple(pieces)
            if key not in self.keys:
                self.keys[key] = len(self.nodes)
                self.nodes.append(key)
            self.seen[id(value)] = self.keys[key]
        return self.seen[id(value)]

    def _write(self, number: int, name: str | None) -> None:
        node = self.nodes[number]
        text = "".join(self._piece(node, place) for place in range(len(node)))
        if not name:
            if len(node) == 1 or (self.uses[number] <= 1 and len(text) <= _LONGEST):
                self.texts[number] = text
                return
            name = f"x{next(self.temporaries)}"
        self.texts[number] = name
        self.lines.append(f"{name} = {text}")

    def _piece(self, node: tuple[str | int, ...], place: int) -> str:
        piece = node[place]
        if isinstance(piece, str):
            return piece
        text = self.texts[piece]
        if _is_closed(text):
            return text
        before = node[place - 1] if place else ""
        after = node[place + 1] if place + 1 < len(node) else ""
        is_argument = str(before).endswith(("(", ", ")) and str(after).startswith((")", ","))
        return text if is_argument else f"({text})"


def _is_closed(text: str) -> bool:
    """Whether a text is a name, a number or one call, so needs no parentheses."""
    name, opening, rest = text.partition("(")
    if not name.replace(".", "").replace("_", "").isalnum():
        return False
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place == len(rest) - 1
    return not opening

"""What the constructors of patterns share: checked parameters, and where a query stands."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import sympy

from sparse_compile.errors import BadPattern
from sparse_compile.expr.nodes import N_KV, N_Q, Q

UPPER_LEFT, LOWER_RIGHT = "upper_left", "lower_right"


def bad(what: str, instead: str) -> BadPattern:
    """The error of a pattern that makes no sense: what is wrong, and what to write instead."""
    return BadPattern(f"sparse_compile: {what}. {instead}")


def store(pattern: Any, **values: Any) -> None:
    """Set parameters of a frozen pattern while it is being made."""
    for name, value in values.items():
        object.__setattr__(pattern, name, value)


def whole(where: str, value: Any, least: int) -> int:
    """``value`` as an int of at least ``least``; ``where`` names it, as in ``"Dilated: window"``.

    >>> whole("Dilated: window", 3, 1)
    3
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise bad(f"{where} must be a whole number, not {value!r}", f"Write {least} or more.")
    if number < least:
        raise bad(f"{where} is {number}", f"Write {least} or more.")
    return number


def whole_from(least: int) -> Callable[[str, Any], int]:
    """The check of a whole number of at least ``least``."""
    return functools.partial(whole, least=least)


def real(where: str, value: Any) -> float:
    """``value`` as a float that is a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise bad(f"{where} is {value!r}", "Write a number.")
    return float(value)


def flag(where: str, value: Any) -> bool:
    """``value`` as a bool; ``where`` names it."""
    if not isinstance(value, bool):
        raise bad(f"{where} is {value!r}", "Write True or False.")
    return value


def choice(where: str, value: Any, allowed: Sequence[str]) -> str:
    """``value`` if it is one of the ``allowed`` words; ``where`` names it."""
    if value not in allowed:
        raise bad(f"{where} is {value!r}", f"Write {' or '.join(map(repr, allowed))}.")
    return str(value)


def one_of(*allowed: str) -> Callable[[str, Any], str]:
    """The check of a parameter that is one of some words."""
    return functools.partial(choice, allowed=allowed)


def optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """The check of a parameter that may be None."""
    return lambda where, value: None if value is None else check(where, value)


#: Types of parameters with their checks, see :mod:`sparse_compile.patterns.parameters`:
#: whole numbers of at least 0 and 1, truth values, and corners in which the diagonal starts.
Count = Annotated[int, whole_from(0)]
Positive = Annotated[int, whole_from(1)]
Flag = Annotated[bool, flag]
Align = Annotated[str, one_of(UPPER_LEFT, LOWER_RIGHT)]


def position(align: str) -> sympy.Expr:
    """Where query ``q`` stands among the keys.

    >>> position("upper_left"), position("lower_right")
    (q, n_kv - n_q + q)
    """
    return Q if align == UPPER_LEFT else Q + N_KV - N_Q


def blocks(length: int, block: int) -> int:
    """How many blocks cover ``length`` tokens; the last may be ragged.

    >>> blocks(100, 64), blocks(128, 64)
    (2, 2)
    """
    return -(-length // block)


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers, which are sorted.

    >>> runs((0, 1, 2, 7, 9, 10))
    [(0, 2), (7, 7), (9, 10)]
    """
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found

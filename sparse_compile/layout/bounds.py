"""Bounds: the ends of a span, one per rectangle of blocks, and the operations on them.

A bound is an int64 tensor with one entry per rectangle, or a Python int where it is the same for
all of them. Truth values are bounds too. Where a kernel is generated, an :class:`Abstract` value
stands for the tensor: it has the same operators, and says itself what the functions here are of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1

Bound = Tensor | int


class Abstract:
    """A bound that is no number yet: what will compute one. Has the operators of a tensor.

    A base and not a protocol, because every step of the analysis asks whether a bound is one.
    """

    @staticmethod
    def least(a: Any, b: Any) -> Any:
        """The smaller of two, one of which is abstract."""
        raise NotImplementedError

    @staticmethod
    def greatest(a: Any, b: Any) -> Any:
        """The larger of two, one of which is abstract."""
        raise NotImplementedError

    @staticmethod
    def where(condition: Any, yes: Any, no: Any) -> Any:
        """``yes`` where an abstract condition holds, else ``no``."""
        raise NotImplementedError


def _abstract(*values: object) -> Abstract | None:
    """The first of these that is abstract."""
    return next((value for value in values if isinstance(value, Abstract)), None)


def least(a: Bound, b: Bound) -> Bound:
    """The smaller of two."""
    if (of := _abstract(a, b)) is not None:
        found: Bound = of.least(a, b)
        return found
    if isinstance(a, Tensor):
        return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)


def greatest(a: Bound, b: Bound) -> Bound:
    """The larger of two."""
    if (of := _abstract(a, b)) is not None:
        found: Bound = of.greatest(a, b)
        return found
    if isinstance(a, Tensor):
        return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)
    return b.clamp(min=a) if isinstance(b, Tensor) else max(a, b)


def where(condition: Bound, yes: Bound, no: Bound) -> Bound:
    """``yes`` where the condition holds, else ``no``."""
    if (of := _abstract(condition)) is not None:
        found: Bound = of.where(condition, yes, no)
        return found
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


def negated(truth: Bound) -> Bound:
    """Logical not."""
    return not truth if isinstance(truth, int) else ~truth


def saturated(value: Bound) -> Bound:
    """A result, brought back into int64 if it is a Python int."""
    # Python ints are unbounded and torch rejects those beyond int64; tensors wrap. Neither matters
    # to the analysis: it drops every entry that could overflow.
    return max(INT64_MIN, min(value, INT64_MAX)) if isinstance(value, int) else value

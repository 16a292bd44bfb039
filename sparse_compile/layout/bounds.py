"""Bounds: the ends of a span, one per rectangle of blocks, and the operations on them.

A bound is an int64 tensor with one entry per rectangle, or a Python int where it is the same for
all of them. Truth values are bounds too. Where a kernel is generated, :class:`Code` that will
compute the tensor stands for it: it has the same operators, and the functions here know it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.codegen.triton.layout import printed
from sparse_compile.codegen.triton.layout.printed import INT64_MAX, INT64_MIN, is_code

Bound = Tensor | int


def least(a: Bound, b: Bound) -> Bound:
    """The smaller of two."""
    if is_code(a, b):
        code: Bound = printed.least(a, b)
        return code
    if isinstance(a, Tensor):
        return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)


def greatest(a: Bound, b: Bound) -> Bound:
    """The larger of two."""
    if is_code(a, b):
        code: Bound = printed.greatest(a, b)
        return code
    if isinstance(a, Tensor):
        return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)
    return b.clamp(min=a) if isinstance(b, Tensor) else max(a, b)


def where(condition: Bound, yes: Bound, no: Bound) -> Bound:
    """``yes`` where the condition holds, else ``no``."""
    if is_code(condition):
        code: Bound = printed.where(condition, yes, no)
        return code
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

"""Every pattern through sparse_compile.attention, forward and gradients, against fp64."""

from __future__ import annotations

import pytest
import torch

from benchmarks.correctness import (
    DTYPES,
    NAMES,
    Case,
    cases,
    errors,
)

SINGLE, *HALVES = DTYPES
#: Every pattern in single precision and in one of the half ones, in turn.
PAIRS = [
    pytest.param(case, dtype, id=f"{case}-{dtype}")
    for number, case in enumerate(cases())
    for dtype in (SINGLE, HALVES[number % len(HALVES)])
]


@pytest.mark.parametrize(("case", "dtype"), PAIRS)
def test_a_pattern_is_as_exact_as_eager(case: Case, dtype: torch.dtype) -> None:
    found, allowed = errors(case, "cpu", dtype)
    for name, error, most in zip(NAMES, found, allowed, strict=True):
        assert error <= most, name

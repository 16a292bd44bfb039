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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_pattern_is_as_exact_as_eager(case: Case, dtype: torch.dtype) -> None:
    found, allowed = errors(case, "cpu", dtype)
    for name, error, most in zip(NAMES, found, allowed, strict=True):
        assert error <= most, name

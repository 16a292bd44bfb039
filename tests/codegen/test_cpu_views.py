"""Masks in views on the CPU: the cases of the kernels, through the executor of the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparse_compile.codegen.cpu import views
from tests.codegen.kernel_cases import CASES, Case, check

IN_VIEWS = [case for case in CASES if case.views]
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case) -> None:
    if case.dtype == torch.float32 or not case.views:
        check(case, CPU, views)
    else:
        check(replace(case, dtype=torch.float32), CPU, views)


@pytest.mark.parametrize("case", IN_VIEWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_case_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype), CPU, views)

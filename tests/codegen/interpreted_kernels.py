"""The kernels in Triton's interpreter; test_triton_interpreter.py runs this in a process."""

import pytest
import torch

from tests.codegen.kernel_cases import CASES, Case, check


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case) -> None:
    check(case, torch.device("cpu"))

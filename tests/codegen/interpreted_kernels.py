"""The block-sparse kernels, in Triton's interpreter."""

import pytest
import torch

from tests.codegen.kernel_cases import CASES, Case, check

pytestmark = pytest.mark.usefixtures("interpreted_kernels")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case) -> None:
    check(case, torch.device("cpu"))

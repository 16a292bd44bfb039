"""The kernels that hold all of a head in one tile, in Triton's interpreter."""

import pytest
import torch

from sparse_compile.codegen.triton.short import executor
from tests.codegen.kernel_cases import Case, check, in_dtype
from tests.codegen.short_cases import CASES

pytestmark = pytest.mark.usefixtures("interpreted_kernels")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case) -> None:
    # Where a row has few keys, that the interpreter cuts bfloat16 off would show.
    single = case.dtype == torch.float32 or case.name == "a bias for each entry"
    check(case if single else in_dtype(case, torch.float32), torch.device("cpu"), executor)

"""The kernels that hold all of a head in one tile, on a GPU."""

import pytest
import torch

from sparse_compile.codegen.triton.short import executor
from tests.codegen.kernel_cases import Case, check, in_dtype
from tests.codegen.short_cases import CASES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, dtype: torch.dtype) -> None:
    check(in_dtype(case, dtype), torch.device("cuda"), executor)

"""Blocks that a selection names, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from sparse_compile.codegen.triton.blocks import executor
from tests.selection.listed_cases import LISTED, Listed, check_listed

pytestmark = pytest.mark.usefixtures("interpreted_kernels")


@pytest.mark.parametrize("case", LISTED, ids=str)
def test_kernels_of_blocks(case: Listed) -> None:
    check_listed(executor, case, torch.device("cpu"), torch.float32)

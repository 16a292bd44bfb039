"""The kernels that read and list a dense mask, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from sparse_compile.codegen.triton.layout import compact_kernel, dense_kernel
from sparse_compile.layout.block_layout import VisitedBlocks
from tests.layout.dense_cases import CASES, DenseCase, check_pass

pytestmark = pytest.mark.usefixtures("interpreted_kernels")


@pytest.fixture(autouse=True)
def _small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small masks have several strips and several steps down."""
    monkeypatch.setattr(dense_kernel, "STRIP", 64)
    monkeypatch.setattr(dense_kernel, "ROWS", 4)
    monkeypatch.setattr(compact_kernel, "CHUNK", 4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: DenseCase) -> None:
    mask = case.mask(torch.device("cpu"))
    found = dense_kernel.read_dense(mask, *case.block)
    check_pass(found, mask, case.block)
    _, kinds, biased = found
    rows, cols, is_biased = compact_kernel.compacted(kinds, biased)
    assert is_biased == bool(biased)
    classes, q, kv = kinds.nonzero().unbind(1)
    visited = VisitedBlocks(classes, q, kv, kinds[classes, q, kv])
    expected = visited.lists(len(kinds), tuple(kinds.shape[1:]))
    for lists, wanted in zip((rows, cols), expected, strict=True):
        assert lists.load is not None
        assert torch.equal(lists.start.long().diff(), lists.load.lines)
        for mine, its in zip(lists.tensors(), wanted.tensors(), strict=True):
            assert torch.equal(mine, its)


def test_any_byte_that_is_not_zero_attends() -> None:
    odd = torch.tensor([[0, 1, 2, 128, 255, 0, 7, 64] * 8] * 8, dtype=torch.uint8)
    mask = odd.view(torch.bool)[None, None]
    assert dense_kernel._in_fours(mask)
    check_pass(dense_kernel.read_dense(mask, 8, 32), (odd != 0)[None, None], (8, 32))

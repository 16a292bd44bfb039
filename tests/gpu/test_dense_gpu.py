"""Dense masks on a CUDA device: the kernel finds what the CPU finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_compile.layout.from_dense import DenseBlocks, dense_layout, remembered
from tests.layout.dense_cases import CASES, DenseCase

LARGE = [
    DenseCase(4096, 4096, block=(128, 128)),
    DenseCase(4096, 4096, block=(64, 64), dtype=torch.bfloat16),
    DenseCase(2048, 4096, block=(128, 64), memory="transposed"),
    DenseCase(1000, 4100, block=(128, 128), batches=2, heads=3),
    DenseCase(1001, 4099, block=(64, 128), heads=4),
    DenseCase(1000, 3000, block=(128, 128), dtype=torch.float32, bias=2.0),
    DenseCase(300, 2100, block=(16, 2048), heads=2),
    # Blocks that the kernel does not do.
    DenseCase(300, 500, block=(24, 40)),
    DenseCase(300, 500, block=(16, 16)),
    DenseCase(300, 500, block=(16, 32), dtype=torch.float64),
]


def kept(mask: Tensor, *block: int) -> DenseBlocks:
    """The blocks of a mask that is stable."""
    return remembered(mask, block, lambda: dense_layout(mask, *block))


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_the_gpu_finds_what_the_cpu_finds(case: DenseCase) -> None:
    found = dense_layout(case.mask(torch.device("cuda")), *case.block)
    expected = dense_layout(case.mask(torch.device("cpu")), *case.block)
    assert found.words.is_cuda
    assert torch.equal(found.words.cpu(), expected.words)
    assert found.biased == expected.biased
    assert torch.equal(found.layout.pack().cpu(), expected.layout.pack())


def test_any_byte_that_is_not_zero_attends() -> None:
    odd = torch.tensor([[0, 1, 2, 128, 255, 0, 7, 64] * 32] * 64, dtype=torch.uint8, device="cuda")
    words = dense_layout(odd.view(torch.bool), 16, 32).words
    assert torch.equal(words, dense_layout(odd != 0, 16, 32).words)


def test_a_mask_of_more_than_two_to_the_31_entries() -> None:
    mask = torch.zeros(1, 9, 16384, 16384, dtype=torch.bool, device="cuda")
    mask[0, 8, -1, -1] = True
    found = dense_layout(mask, 128, 128)
    assert found.layout.nnz_blocks == 1
    assert int(found.words[-1, -1, -1]) == -(1 << 31)


def test_results_of_cuda_graphs_are_read_every_time() -> None:
    """Inductor hands out the same tensor again and again, and counts no writes to it."""

    @torch.compile(mode="reduce-overhead")
    def near(distance: Tensor) -> Tensor:
        place = torch.arange(256, device="cuda")
        return (place[:, None] - place).abs() <= distance

    for width in (3, 3, 40, 90, 7, 200):
        torch.compiler.cudagraph_mark_step_begin()
        mask = near(torch.tensor(width, device="cuda"))
        found = kept(mask, 64, 64)
        assert torch.equal(found.words, dense_layout(mask.clone(), 64, 64).words)


def test_an_unmodified_mask_that_is_stable_is_remembered() -> None:
    mask = torch.ones(256, 256, dtype=torch.bool, device="cuda").tril()
    first = kept(mask, 64, 64)
    assert kept(mask, 64, 64) is first
    mask[:64] = False
    assert kept(mask, 64, 64) is not first

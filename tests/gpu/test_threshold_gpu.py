"""Masks of scores that reach the k-th best, on a CUDA device: the lists, and a compiled model."""

from __future__ import annotations

import pytest
import torch

from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.ops.kept import KEPT_SELECTION
from sparse_compile.selection import Selection
from tests.passes.rewritten import trained
from tests.passes.test_recognise_threshold import Indexed
from tests.tolerance import relative_error


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("units", [(1, 1), (16, 64)])
def test_lists(units: tuple[int, int], fixed: bool) -> None:
    n, mask = 3000, MaskExpr(KV <= Q)
    shape = 2, 3, -(-n // units[0]), -(-n // units[1])
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.1
    args = fixed, [], [], [6, n, n], list(units), mask.text
    found = Selection(*(part.cpu() for part in KEPT_SELECTION(kept.cuda(), *args)), *units)
    expected = Selection(*KEPT_SELECTION(kept, *args), *units)
    assert torch.equal(found.count, expected.count)
    assert torch.equal(found.dense(n, n), expected.dense(n, n))


def test_a_compiled_model() -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        network, x = Indexed(), torch.randn(2, 700, Indexed.WIDTH).round()
        for layer in (network.index_q, network.index_k, network.weights):
            layer.weight.data.mul_(8).round_()  # scores are exact, and many equal
        fast = torch.compile(network, backend="sparse_compile", fullgraph=True)
        for ours, theirs in zip(
            trained(fast, network, x), trained(network, network, x), strict=True
        ):
            assert (ours is None) == (theirs is None)
            assert ours is None or relative_error(ours, theirs) < 1e-4

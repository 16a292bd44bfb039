"""attention() with a softcap and with sinks, against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import sparse_compile
from sparse_compile import patterns as P
from sparse_compile import reference
from sparse_compile.errors import BadShape
from sparse_compile.expr import evaluate_score, softcap
from tests.tolerance import relative_error

N = 90
MASKS = {
    "causal": P.Causal(),
    "window": P.SlidingWindow(15, 0),
    "selected": P.Selected(torch.tensor([[0, 2], [1, 3], [0, 1]]).expand(2, 2, 3, 2), 16, 32),
    "tensor": torch.ones(N, N, dtype=torch.bool).tril(-3),
    "none": None,
}


def allowed(name: str) -> Tensor | None:
    mask = MASKS[name]
    if mask is None or isinstance(mask, Tensor):
        return mask
    if name == "selected":
        units = torch.zeros(3, 6, dtype=torch.bool)
        units[[0, 0, 1, 1, 2, 2], [0, 2, 1, 3, 0, 1]] = True
        return units.repeat_interleave(32, 0).repeat_interleave(16, 1)[:N, :N]
    return mask.dense(N, N)


@pytest.mark.parametrize("given", ["softcap", "sinks", "both"])
@pytest.mark.parametrize("name", MASKS)
def test_softcap_and_sinks(name: str, given: str) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 6, N, 16, requires_grad=True)
    k, v = (torch.randn(2, 2, N, 16, requires_grad=True) for _ in range(2))
    sinks = torch.randn(6, requires_grad=True) if given != "softcap" else None
    cap = 1.5 if given != "sinks" else None
    out = sparse_compile.attention(q, k, v, MASKS[name], softcap=cap, sinks=sinks)
    score = partial(evaluate_score, softcap(cap)) if cap else None
    truth, _ = reference.attention(
        q, k, v, allowed(name), score=score, sinks=None if sinks is None else sinks[:, None]
    )
    assert relative_error(out, truth) <= 1e-5
    inputs = [t for t in (q, k, v, sinks) if t is not None]
    weights = torch.randn(out.shape)
    ours = torch.autograd.grad((out * weights).sum(), inputs)
    theirs = torch.autograd.grad((truth * weights).sum(), inputs)
    for mine, exact in zip(ours, theirs, strict=True):
        assert relative_error(mine, exact) <= 1e-5


def test_in_compiled_code() -> None:
    torch._dynamo.reset()
    q = torch.randn(1, 4, N, 16)
    sinks = torch.randn(4)

    def program(q: Tensor, sinks: Tensor) -> Tensor:
        capped = sparse_compile.attention(q, q, q, P.Causal(), softcap=2.0, sinks=sinks)
        return capped + sparse_compile.attention(q, q, q, P.SlidingWindow(9, 0), softcap=3.0)

    compiled = torch.compile(program, backend="eager", fullgraph=True)
    assert relative_error(compiled(q, sinks), program(q, sinks)) <= 1e-6


def test_sinks_for_another_number_of_heads() -> None:
    q = torch.randn(1, 4, N, 16)
    with pytest.raises(BadShape, match="each of 4 query heads"):
        sparse_compile.attention(q, q, q, sinks=torch.randn(2))

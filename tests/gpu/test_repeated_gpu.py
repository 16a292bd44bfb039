"""Calls that are repeated on a CUDA device: values, other streams, and Triton's own launcher."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import sparse_compile
from sparse_compile import patterns as P
from sparse_compile.codegen.repeated import REPEATS, Repeat
from sparse_compile.codegen.runtime import direct
from sparse_compile.codegen.triton import calls
from sparse_compile.expr import KV, N_Q, SCORE, H, Q, ScoreProgram, learned
from sparse_compile.layout.lists import lists_of
from sparse_compile.ops.attention import attention, attention_backward
from tests.tolerance import assert_close_as_eager

#: Whose queries are put in order, for the backward of a view.
STRIDED = P.Strided(16)
MASKS = {
    "window": P.SlidingWindow(100, 0),
    "global tokens": P.SlidingWindow(30) | P.Global(3),
    "strided": STRIDED,
    "documents": P.Documents(torch.arange(1000) // 300) & P.Causal(),
    "each head its own": P.Heads((P.SlidingWindow(70, 0), P.Causal()), per=2),
}


def operands(seed: int, dtype: torch.dtype, n: int = 1000) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(2, n, h, 64, generator=generator) for h in (4, 2, 2, 4)]
    return [t.to("cuda", dtype).transpose(1, 2) for t in made]


def run(mask: P.Pattern, tensors: list[Tensor]) -> list[Tensor]:
    *inputs, grad = [t.detach() for t in tensors]
    inputs = [t.requires_grad_() for t in inputs]
    out = sparse_compile.attention(*inputs, mask)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def dense(mask: P.Pattern, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The same by PyTorch, in a dtype."""
    *inputs, grad = [t.detach().to(dtype) for t in tensors]
    inputs = [t.requires_grad_() for t in inputs]
    q, k, v = (t.repeat_interleave(4 // t.shape[1], 1) for t in inputs)
    scores = q @ k.mT * 64**-0.5
    hidden = ~mask.dense(1000, 1000, batch=2, heads=4, device="cuda")
    out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return [out, *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("known", [True, False], ids=["C function", "launcher"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_values_of_repeated_calls(
    mask: P.Pattern, dtype: torch.dtype, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.setattr(direct, "_KNOWN", ())
    calls.forget()
    for seed in range(4):
        tensors = operands(seed, dtype)
        found = run(mask, tensors)
    eager, exact = (dense(mask, tensors, kind) for kind in (dtype, torch.float64))
    for name, *three in zip(("out", "dq", "dk", "dv"), found, eager, exact, strict=True):
        assert_close_as_eager(name, *three)
    # A layout of tables is made, and kept, by the first call of all.
    attended = {key: one for key, one in REPEATS.items() if key[0].__name__ != "layout"}
    forward_and_backward = [type(repeat) is Repeat for repeat in attended.values()]
    assert forward_and_backward == [True, mask is not STRIDED]
    calls.forget()


def test_gradients_of_biases_are_repeated() -> None:
    layout = MASKS["window"].layout(1000, 1000, batch=2, heads=4, block=(128, 128))
    by_distance = ScoreProgram(SCORE + learned(0)(H, KV - Q + N_Q - 1), ("float16",))
    spec = replace(layout.spec, score=by_distance).text
    cuda = torch.device("cuda")
    lists = [t.to(cuda) for t in lists_of(layout, 2, cuda)]
    q, k, v, grad = operands(0, torch.float16)
    bias = torch.randn(4, 1999, device="cuda", dtype=torch.float16)
    out, lse = attention(q, k, v, [bias], [], [], lists, 0.125, spec)

    def gradients() -> list[Tensor]:
        found: list[Tensor] = attention_backward(
            grad, None, out, lse, q, k, v, [bias], [], [], lists, 0.125, spec, [0]
        )
        return found

    calls.forget()
    first, *others = (gradients() for _ in range(4))
    assert [type(repeat) for repeat in REPEATS.values()] == [Repeat]
    for again in others:
        torch.testing.assert_close(again, first, atol=0, rtol=0)
    calls.forget()


def test_repeated_calls_run_on_the_current_stream() -> None:
    mask, tensors = MASKS["window"], operands(0, torch.float16)
    first = run(mask, tensors)
    run(mask, tensors)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        again = run(mask, tensors)
        assert not side.query()  # the kernels wait behind what this stream has to do
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(again, first, atol=0, rtol=0)

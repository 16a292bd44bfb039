"""Score programs, biases with gradients and dropout on a GPU, against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch

from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.triton.blocks import executor
from sparse_compile.expr import KV, N_Q, SCORE, H, MaskExpr, Q, ScoreProgram, learned
from sparse_compile.layout import build_views
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.spec import AttentionSpec
from tests.codegen.kernel_cases import CAUSAL, EVERYTHING, Case, biases, check
from tests.codegen.score_cases import CASES, _learned

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DISTANCE = ScoreProgram(SCORE + learned(0)(H, KV - Q + N_Q - 1), ("bfloat16",))
PAIRS = ScoreProgram(SCORE + learned(0)(H, Q, KV), ("bfloat16",))
WINDOW = MaskExpr(sympy.Abs(Q - KV) < 100)


def first_of(number: int) -> object:
    return lambda case, device: [biases(case, device)[number]]


SHAPES = [
    *(
        Case(
            name,
            mask,
            n=(700, 700),
            heads=heads,
            dims=(dim, dim),
            dtype=BF16,
            block=(128, 128),
            score=score,
            learned=first_of(number),  # type: ignore[arg-type]
        )
        for name, score, number in (("distance", DISTANCE, 0), ("pairs", PAIRS, 2))
        for mask in (CAUSAL, EVERYTHING, WINDOW)
        for dim, heads in ((64, (4, 2)), (128, (3, 1)), (32, (4, 4)))
    ),
    *(
        Case(
            "dropout",
            mask,
            n=(1000, 900),
            heads=(4, 2),
            dims=(dim, dim),
            dtype=dtype,
            block=(128, 128),
            dropout=0.1,
        )
        for mask in (EVERYTHING, WINDOW)
        for dim in (64, 128, 256)
        for dtype in (BF16, F32)
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_of_the_interpreter(case: Case) -> None:
    check(case, torch.device("cuda"))


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case: Case) -> None:
    check(case, torch.device("cuda"))


def test_gradients_of_learned_tensors_are_the_same_bits_each_time() -> None:
    device = torch.device("cuda")
    case = Case("all", CAUSAL, n=(900, 900), heads=(4, 2), batch=2, score=_learned("float32"))
    case = replace(case, dims=(64, 64), dtype=F32)
    tensors = tuple(biases(case, device))
    q, k, v = (torch.randn(2, h, 900, 64, device=device) for h in (4, 2, 2))
    spec = AttentionSpec(CAUSAL, score=case.score)
    layout = build_views(spec, ProblemShape(2, 4, 900, 900), [], [], device)
    call = AttentionCall(q, k, v, [], [], [], 0.2, spec, tensors, layout)
    out, lse = executor.forward(call)
    result = AttentionResult(out, lse, torch.randn_like(out), None, tuple(range(5)))
    first, second = executor.backward(call, result), executor.backward(call, result)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

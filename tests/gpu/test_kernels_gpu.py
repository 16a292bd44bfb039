"""The Triton kernels on a GPU: every case of the interpreter's, and many more shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.triton.blocks import executor
from sparse_compile.layout import build_views, unpack
from sparse_compile.layout.lists import lists_of
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.spec import AttentionSpec
from tests.codegen.kernel_cases import (
    CASES,
    CAUSAL,
    EVERYTHING,
    OFFSET,
    Case,
    check,
    in_dtype,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMED = {case.name: case for case in CASES}
WINDOW, DOCUMENTS, PER_HEAD = (NAMED[n] for n in ("window", "documents", "window per head"))
DIMS = (32, 64, 72, 80, 96, 128, 192, 256)
SHAPES = [
    *(
        replace(WINDOW, n=(333, 333), heads=(4, 2), dims=(dim, dim), dtype=dtype, block=(128, 128))
        for dim in DIMS
        for dtype in (F32, F16, BF16)
    ),
    *(
        replace(DOCUMENTS, n=(700, 700), dims=dims, dtype=dtype, block=(128, 128))
        for dims in ((64, 128), (192, 128), (40, 256), (33, 47))
        for dtype in (F16, F32)
    ),
    *(
        replace(PER_HEAD, n=(400, 400), heads=(heads * group, heads), dims=(64, 64), dtype=BF16)
        for heads, group in ((4, 1), (2, 3), (2, 4), (1, 7), (1, 8))
    ),
    *(
        replace(WINDOW, n=(300, 300), dims=(64, 64), dtype=dtype, block=block)
        for block in ((16, 16), (32, 128), (128, 16), (64, 64), (128, 64))
        for dtype in (F32, BF16)
    ),
    Case("causal", CAUSAL, n=(2100, 2100), dims=(128, 128), dtype=BF16, block=(128, 128)),
    Case("everything", EVERYTHING, n=(513, 1025), dims=(128, 128), dtype=F16, block=(128, 128)),
    Case("everything", EVERYTHING, n=(512, 1024), dims=(64, 64), dtype=BF16, block=(128, 128)),
    Case("offset", OFFSET, n=(100, 1500), sizes=(1400, 700), dims=(128, 128), dtype=BF16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_of_the_interpreter(case: Case) -> None:
    check(case, torch.device("cuda"))


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: f"{case}-{case.block}")
def test_shape(case: Case) -> None:
    check(case, torch.device("cuda"))


@pytest.mark.parametrize("name", ["padding", "negative division", "tables of differences"])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_case_in_half_precision(name: str, dtype: torch.dtype) -> None:
    check(in_dtype(NAMED[name], dtype), torch.device("cuda"))


def _run(case: Case) -> list[torch.Tensor]:
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, n, 64, device=device, dtype=BF16, generator=generator)
        for n in (case.n[0], case.n[1], case.n[1])
    )
    spec = AttentionSpec(case.mask)
    shape = ProblemShape(1, 2, *case.n)
    layout = build_views(spec, shape, sizes=case.sizes, device=device)
    # As the operators get it: views into what a graph holds.
    layout = unpack(spec, lists_of(layout, 2, device), shape, sizes=case.sizes)
    call = AttentionCall(q, k, v, [], case.sizes, [], 0.1, spec, layout=layout)
    out, lse = executor.forward(call)
    grads = executor.backward(call, AttentionResult(out, lse, torch.ones_like(out)))
    return [out, lse, *grads]


def test_two_runs_give_the_same_bits() -> None:
    case = Case("offset", OFFSET, n=(900, 1100), sizes=(200, 512))
    assert all(torch.equal(a, b) for a, b in zip(_run(case), _run(case), strict=True))


def test_new_lengths_and_sizes_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    _run(Case("offset", OFFSET, n=(900, 1100), sizes=(200, 512)))
    compiled = []
    original = JITFunction._do_compile  # private: nothing public says that a launch compiled
    monkeypatch.setattr(
        JITFunction, "_do_compile", lambda *a, **k: compiled.append(a) or original(*a, **k)
    )
    for n in ((901, 1), (1, 77), (16, 160), (640, 640)):
        for sizes in ((1, 16), (0, 2), (-7, 33)):
            _run(Case("offset", OFFSET, n=n, sizes=sizes))
    assert not compiled

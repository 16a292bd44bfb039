"""The forward in Gluon on a GPU: values, gradients, the same bits twice, repeated calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from torch import Tensor

import sparse_compile
from sparse_compile import patterns as P
from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.generators import generators
from sparse_compile.codegen.repeated import REPEATS, Repeat
from sparse_compile.codegen.runtime import direct
from sparse_compile.codegen.triton import calls
from sparse_compile.codegen.triton.blocks import executor
from sparse_compile.expr import KV, B, H, MaskExpr, Q
from sparse_compile.layout import build_views
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.spec import AttentionSpec, KernelSpec
from sparse_compile.spec.target import Target
from tests.codegen.kernel_cases import CAUSAL, EVERYTHING, OFFSET, Case, check
from tests.tolerance import assert_close_as_eager

F16, BF16 = torch.float16, torch.bfloat16
BLOCKS = {64: (192, 128), 128: (128, 128)}

WINDOW = MaskExpr((KV <= Q) & (Q - KV < 300))
PREFIX = MaskExpr((KV <= Q) | (KV < 100))
SINK = MaskExpr((KV <= Q) & ((Q - KV < 300) | (KV < 4)))
BY_HEAD = MaskExpr((KV <= Q) & (Q - KV < 150 * (H + 1)))
BY_BATCH = MaskExpr((KV <= Q) & (Q - KV < 150 * (B + 1)))
#: A few lines that visit everything, which are split, and others that visit little.
SPLIT = MaskExpr((sympy.Abs(Q - KV) <= 4) | (Q < 3) | (KV < 3))
CASES = [
    Case("causal", CAUSAL, n=(768, 768), heads=(4, 4)),
    Case("causal", CAUSAL, n=(2100, 2100), heads=(8, 1)),
    Case("causal", CAUSAL, n=(1000, 1000), heads=(6, 2), batch=2),
    Case("one query", EVERYTHING, n=(1, 300), heads=(1, 1)),
    Case("everything", EVERYTHING, n=(513, 1025), heads=(3, 1)),
    Case("window", WINDOW, n=(1300, 1300), heads=(4, 2)),
    Case("window and sink", SINK, n=(1300, 1300), heads=(8, 1)),
    Case("prefix", PREFIX, n=(700, 700), heads=(3, 1), batch=2),
    Case("window by head", BY_HEAD, n=(1111, 1111), heads=(6, 2), batch=2),
    Case("window by batch entry", BY_BATCH, n=(900, 900), heads=(2, 2), batch=3),
    Case("offset", OFFSET, n=(100, 1500), sizes=(1400, 700), heads=(4, 1)),
    Case("empty rows", OFFSET, n=(900, 600), sizes=(-250, 80), heads=(2, 1)),
    Case("nothing", MaskExpr(sympy.false), n=(300, 200), heads=(1, 1)),
    Case("split lines", SPLIT, n=(5000, 5000), heads=(1, 1)),
    Case("negative scale", CAUSAL, n=(300, 300), scale=-0.3),
]
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    if Target.of(DEVICE).arch != "sm_90":
        pytest.skip("for Hopper")


def served(spec: AttentionSpec, dim: int, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return generators().choose(KernelSpec(spec, dim, dim, name, "sm_90")).generator


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, dim: int, dtype: torch.dtype) -> None:
    """Output, log-sum-exp and gradients against fp64; operands are strided."""
    block_q, block_kv = BLOCKS[dim]
    spec = AttentionSpec(case.mask, block_q=block_q, block_kv=block_kv)
    assert served(spec, dim, dtype) == "gluon"
    check(replace(case, dims=(dim, dim), dtype=dtype, block=(block_q, block_kv)), DEVICE)
    assert served(spec, dim, dtype) == "gluon"  # it was not refused since


def test_lines_are_split() -> None:
    spec = AttentionSpec(SPLIT, block_q=192, block_kv=128)
    layout = build_views(spec, ProblemShape(1, 1, 5000, 5000), device=DEVICE)
    (work,) = layout.schedules("q", 1, 264, DEVICE)
    assert work.slots


@pytest.mark.parametrize("mask", [CAUSAL, WINDOW, SPLIT, BY_HEAD], ids=str)
def test_two_runs_give_the_same_bits(mask: MaskExpr) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = (1, 16, 5000, 64), (1, 4, 5000, 64), (1, 4, 5000, 64)
    q, k, v = (torch.randn(s, device=DEVICE, dtype=BF16, generator=generator) for s in shapes)
    spec = AttentionSpec(mask, block_q=192, block_kv=128)
    layout = build_views(spec, ProblemShape(1, 16, 5000, 5000), device=DEVICE)
    call = AttentionCall(q, k, v, [], [], [], 0.125, spec, layout=layout)
    first = executor.forward(call)
    for _ in range(10):
        again = executor.forward(call)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("known", [True, False], ids=["C function", "launcher"])
@pytest.mark.parametrize("train", [False, True])
def test_compiled_calls_choose_and_repeat_it(
    train: bool, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.setattr(direct, "_KNOWN", ())
    calls.forget()
    torch._dynamo.reset()
    pattern, n, heads = P.SlidingWindow(3000, 0), 4096, (16, 4)

    @torch.compile(backend="sparse_compile", fullgraph=True)
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_compile.attention(q, k, v, pattern)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(heads[0] // heads[1], 1) for t in (k, v))
        hidden = ~pattern.dense(n, n, batch=1, heads=1, device="cuda")
        return (q @ k.mT * 64**-0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    for seed in range(5):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        shapes = [(1, n, h, 64) for h in (heads[0], heads[1], heads[1])]
        made = [torch.randn(s, device=DEVICE, dtype=BF16, generator=generator) for s in shapes]
        operands = [t.transpose(1, 2).requires_grad_(train) for t in made]
        out = run(*operands)
    started = [repeat for repeat in REPEATS.values() if type(repeat) is Repeat]
    assert started
    names = {one.generator for one in generators()._chosen.values()}
    assert "gluon" in names
    eager = dense(*operands)
    exact_inputs = [t.detach().double().requires_grad_(train) for t in operands]
    exact = dense(*exact_inputs)
    assert_close_as_eager("out", out, eager, exact)
    if train:
        grad = torch.randn_like(out)
        found = torch.autograd.grad(out, operands, grad)
        wanted = torch.autograd.grad(eager, operands, grad)
        true = torch.autograd.grad(exact, exact_inputs, grad.double())
        for name, *three in zip(("dq", "dk", "dv"), found, wanted, true, strict=True):
            assert_close_as_eager(name, *three)
    calls.forget()


def test_one_graph_is_recorded() -> None:
    """CUDA graphs: its launches are replayed with other operands."""
    spec = AttentionSpec(WINDOW, block_q=192, block_kv=128)
    layout = build_views(spec, ProblemShape(1, 8, 2000, 2000), device=DEVICE)
    q, k, v = (torch.randn(1, 8, 2000, 64, device=DEVICE, dtype=BF16) for _ in range(3))
    call = AttentionCall(q, k, v, [], [], [], 0.125, spec, layout=layout)
    for _ in range(3):
        executor.forward(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = executor.forward(call)
    q.copy_(torch.randn_like(q))
    graph.replay()
    wanted = executor.forward(call)
    assert torch.equal(out, wanted[0])
    assert torch.equal(lse, wanted[1])

"""Layouts that calls make are repeated on a CUDA device: other contents, streams and graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_compile.backend  # noqa: F401  which registers the operators
from sparse_compile.codegen.repeated import REPEATS, Repeat
from sparse_compile.codegen.runtime import direct
from sparse_compile.codegen.triton import calls
from sparse_compile.expr import KV, B, H, MaskExpr, Q, table
from sparse_compile.layout import Layout, Schedule, build_views, unpack
from sparse_compile.layout.from_dense import NO_READS
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.layout.views.split_views import choose_views
from sparse_compile.ops.registered import RUN
from sparse_compile.spec import AttentionSpec
from tests.codegen.started import Operations
from tests.gpu.waiting import no_waiting
from tests.tolerance import relative_error

BATCH, HEADS, N, GPU = 2, 4, 2000, torch.device("cuda")
SHAPE = ProblemShape(BATCH, HEADS, N, N)
DOCUMENTS = sympy.Eq(table(0)(B, Q), table(0)(B, KV))
NEAR = sympy.Abs(Q - KV) < 100
REAL_Q, REAL_KV = (sympy.Ne(table(0)(B, axis), 0) for axis in (Q, KV))


def documents(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 9, (BATCH, N), generator=generator).sort(-1)[0]


def real(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.arange(N) < torch.randint(1, N, (BATCH, 1), generator=generator)


def numbers(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, N, (BATCH,), generator=generator, dtype=torch.int32)


def windows(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, N, (HEADS,), generator=generator)


MASKS: dict[str, tuple[MaskExpr, Callable[[int], Tensor]]] = {
    "documents": (MaskExpr((KV <= Q) & DOCUMENTS, ("int64",)), documents),
    "a global token": (MaskExpr(DOCUMENTS & (NEAR | (KV < 1) | (Q < 1)), ("int64",)), documents),
    "padding": (MaskExpr(REAL_KV, ("bool",)), real),
    "window of padding": (MaskExpr(NEAR & REAL_Q & REAL_KV, ("bool",)), real),
    "up to a number": (MaskExpr(KV <= table(0)(B), ("int32",)), numbers),
    "window of each head": (MaskExpr((KV <= Q) & (Q - KV < table(0)(H)), ("int64",)), windows),
}


@functools.cache
def spec_of(mask: MaskExpr) -> AttentionSpec:
    return choose_views(mask, ProblemShape(1, 1, 4096, 4096), (64, 64))[0]


def listed(mask: MaskExpr, data: Tensor) -> list[Tensor]:
    run: Any = getattr(torch.ops.sparse_compile.layout, RUN)
    text = spec_of(mask).text
    found: list[Tensor] = run([data], NO_READS, [], *SHAPE, HEADS, text, GPU, [])
    return found


def wanted(mask: MaskExpr, data: Tensor) -> Layout:
    return build_views(spec_of(mask), SHAPE, [data.cpu()])


def check(mask: MaskExpr, data: Tensor, lists: list[Tensor]) -> None:
    """What is listed is what the CPU lists."""
    for view, its in zip(
        unpack(spec_of(mask), lists, SHAPE).views, wanted(mask, data).views, strict=True
    ):
        for side, expected in ((view.rows, its.rows), (view.cols, its.cols)):
            assert torch.equal(side.counts.cpu(), expected.counts)
            for c in range(view.classes):
                found = (part.cpu() for part in side.entries(c))
                assert all(map(torch.equal, found, expected.entries(c)))


@pytest.mark.parametrize("known", [True, False], ids=["C function", "launcher"])
@pytest.mark.parametrize("name", MASKS)
def test_other_contents_of_equal_shapes(
    name: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.setattr(direct, "_KNOWN", ())
    mask, data = MASKS[name]
    calls.forget()
    tables = [data(seed).cuda() for seed in range(6)]
    made = [listed(mask, given) for given in tables[:3]]
    assert [type(found) for found in REPEATS.values()] == [Repeat]
    with no_waiting():
        made += [listed(mask, given) for given in tables[3:]]
    # All of them at the end: no call may write to what an earlier one returned.
    for given, lists in zip(tables, made, strict=True):
        check(mask, given, lists)
        assert all(map(torch.equal, lists[1:], made[0][1:]))
        assert [t.shape for t in lists] == [t.shape for t in made[0]]
    calls.forget()


def test_worklists_may_be_overwritten() -> None:
    mask, data = MASKS["a global token"]
    calls.forget()
    for _ in range(4):
        lists = listed(mask, data(0).cuda())
        works = [Schedule.unpack(*lists[i : i + 2]) for i in (1, 3)]
        assert all(sorted(work.items[:, 0].unique().tolist()) == [*range(32)] for work in works)
        for t in lists:
            t.fill_(-1)
    calls.forget()


@pytest.mark.parametrize("name", MASKS)
def test_a_repeated_layout_takes_few_operations(name: str) -> None:
    """Its memory aside, it copies two worklists."""
    mask, data = MASKS[name]
    calls.forget()
    for seed in range(3):
        listed(mask, data(seed).cuda())
    given, operations = data(3).cuda(), Operations()
    with operations:
        listed(mask, given)
    assert {**operations.seen, "empty_strided": 0} == {"copy_": 2, "empty_strided": 0}
    calls.forget()


def test_repeated_layouts_are_made_on_the_current_stream() -> None:
    mask, data = MASKS["documents"]
    for seed in range(3):
        listed(mask, data(seed).cuda())
    given, late = data(3).cuda(), data(4).cuda()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        given.copy_(late)
        lists = listed(mask, given)
        assert not side.query()
    side.synchronize()
    check(mask, late, lists)


def test_a_captured_layout_follows_its_table() -> None:
    mask, data = MASKS["a global token"]
    given = data(0).cuda()
    for _ in range(3):
        listed(mask, given)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        lists = listed(mask, given)
    for seed in (1, 2):
        given.copy_(data(seed))
        graph.replay()
        check(mask, given, lists)


def test_compiled_code() -> None:
    """Documents that differ in each step, forward and backward."""

    def attend(q: Tensor, k: Tensor, v: Tensor, number: Tensor) -> Tensor:
        i = torch.arange(q.shape[2], device=q.device)
        same = number[:, None, :, None] == number[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=same & (i[:, None] >= i))

    run = torch.compile(attend, backend="sparse_compile", fullgraph=True)
    for seed in range(6):
        torch.manual_seed(seed)
        *inputs, grad = (
            torch.randn(BATCH, HEADS, N, 64, device=GPU, dtype=torch.bfloat16) for _ in range(4)
        )
        inputs, number = [t.requires_grad_() for t in inputs], documents(seed).cuda()
        out = run(*inputs, number)
        found = [out.clone(), *(t.clone() for t in torch.autograd.grad(out, inputs, grad))]
        wide = [t.detach().double().requires_grad_() for t in inputs]
        exact = attend(*wide, number)
        for mine, its in zip(
            found, [exact, *torch.autograd.grad(exact, wide, grad.double())], strict=True
        ):
            assert relative_error(mine, its) < 2e-2

"""Layouts on a CUDA device: equal to those of the CPU, and built without waiting for it."""

from __future__ import annotations

import pytest
import sympy
import torch

from sparse_compile.expr import KV, B, FloorDiv, H, MaskExpr, Q, size_symbol, table
from sparse_compile.layout import BlockLayout, build_layout, mask_pairs, picture
from sparse_compile.layout.superset import Problem, ProblemShape
from tests.gpu.waiting import no_waiting

T0, T1 = table(0), table(1)
BATCH, HEADS, TOKENS = 3, 4, 1000
SHAPE, BLOCKS = ProblemShape(BATCH, HEADS, TOKENS, TOKENS), (64, 32)
DTYPES = ("int64", "int32")

PREDICATES = {
    "static": (KV <= Q) & (Q - KV < 300),
    "documents": (KV <= Q) & sympy.Eq(T0(B, Q), T0(B, KV)),
    "per-head window": (KV <= Q) & (Q - KV < T1(H)),
    "both": (Q - KV < T1(H)) & sympy.Eq(T0(B, Q), T0(B, KV)) & (KV <= Q + size_symbol(0)),
    "coarse table": sympy.Ne(T0(B, FloorDiv(KV, 4) + 3), 1),
    "whole axis": T0(B, sympy.Abs(Q - KV)) < 2,
    "arithmetic": T0(B, KV) * 3 - Q < T1(H),
}


def tables() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(0, 5, (BATCH, TOKENS), generator=generator).sort(-1)[0]
    return [documents, torch.tensor([1, 50, 400, 2000], dtype=torch.int32)]


def equal(left: BlockLayout, right: BlockLayout) -> bool:
    """The same blocks by rows and by columns; the room of a line may differ."""
    return all(
        torch.equal(a.cpu(), b.cpu())
        for c in range(left.classes)
        for x, y in ((left.rows, right.rows), (left.cols, right.cols))
        for a, b in zip(x.entries(c), y.entries(c), strict=True)
    )


@pytest.mark.parametrize("name", PREDICATES)
def test_the_gpu_builds_what_the_cpu_builds_without_synchronising(name: str) -> None:
    mask = MaskExpr(PREDICATES[name], DTYPES, 1)
    problem = Problem.of(mask, SHAPE, BLOCKS, [100])
    expected = build_layout(problem, tables())
    on_device = [entry.cuda() for entry in tables()]
    # The first call moves the superset to the device, once.
    build_layout(problem, on_device, device="cuda")
    with no_waiting():
        layout = build_layout(problem, on_device, device="cuda")
        packed = layout.pack()
    assert packed.is_cuda
    assert equal(layout, expected)
    assert picture(layout) == picture(expected)
    pairs = mask_pairs(mask, expected, BATCH, HEADS, tables(), [100])
    assert mask_pairs(mask, layout, BATCH, HEADS, on_device, [100]) == pairs


def test_a_captured_build_follows_its_tables() -> None:
    """In a CUDA graph: new documents in the same storage give a new layout on replay."""
    mask = MaskExpr(PREDICATES["documents"], ("int64",))
    documents = tables()[0].cuda()
    problem = Problem.of(mask, SHAPE, BLOCKS)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        build_layout(problem, [documents], device="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layout = build_layout(problem, [documents], device="cuda")
    changed = (torch.arange(TOKENS) // 90).expand(BATCH, TOKENS)
    documents.copy_(changed)
    graph.replay()
    assert equal(layout, build_layout(problem, [changed]))

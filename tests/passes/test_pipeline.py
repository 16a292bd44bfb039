"""The pipeline: its passes, what its traces hold, and that nothing is done twice."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from sparse_compile.codegen.generators import generators
from sparse_compile.options import Options
from sparse_compile.passes import pipeline
from sparse_compile.passes.lift import driver
from sparse_compile.sites.plan import Plan, Trace
from sparse_compile.sites.site import LiftedMask, Rejection
from sparse_compile.spec import KernelSpec
from sparse_compile.spec.target import Target

N = 128
DESIGN = Path(__file__).parents[2] / "docs" / "DESIGN.md"
PLANNED = ["find", "lift", "restrict", "propose", "decide"]


def traces_of(
    program: Callable[..., Any], *args: Any, target: Target | None = None, **options: Any
) -> tuple[Trace, ...]:
    found: list[Trace] = []

    def look(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        before = str(gm.graph)
        found.extend(pipeline.plan(gm, inputs, Options(**options), target))
        assert str(gm.graph) == before
        return gm.forward

    torch._dynamo.reset()
    torch.compile(program, backend=look, dynamic=False)(*args)
    return tuple(found)


def operands() -> list[Tensor]:
    return [torch.randn(1, 2, N, 16) for _ in range(3)]


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(N)[:, None], torch.arange(N)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & (i - j < 9))


def threshold(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    mask = gate >= gate.topk(1, -1).values[..., -1:]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_the_passes_are_those_of_the_documentation() -> None:
    assert f"`{' -> '.join(pipeline.PASSES)}`" in DESIGN.read_text()
    body = Path(pipeline.__file__).read_text()
    straight = body[body.index("def plan(") : body.index("def find(")]
    assert re.findall(r"traces = (?:_each\(\s*\"(\w+)\"|(\w+)\(gm\))", straight)


def test_a_trace_holds_what_each_pass_found() -> None:
    (trace,) = traces_of(window, *operands(), decide="sparse")
    assert trace.where[-1].startswith("test_pipeline.py")
    assert isinstance(trace.lifted, LiftedMask)
    (reading,) = trace.readings
    assert reading.mask is trace.lifted
    assert not reading.changed
    assert trace.target == Target.of(torch.device("cpu"))
    names = [way.cost.name for way in trace.proposals]
    assert names == ["block-sparse", "dense"]
    assert trace.proposals[0].decision is trace.decision
    assert "sparse" in trace.proposals[1].cost.refusal
    assert [name for name, _ in trace.seconds] == PLANNED
    assert all(seconds >= 0 for _, seconds in trace.seconds)


def test_a_site_left_dense_keeps_its_mask_and_both_costs() -> None:
    (trace,) = traces_of(window, *operands())
    assert isinstance(trace.decision, Rejection)
    assert isinstance(trace.lifted, LiftedMask)
    sparse, dense = trace.proposals
    assert isinstance(sparse.decision, Plan)
    assert 0 < dense.cost.seconds < sparse.cost.seconds
    assert not sparse.cost.refusal
    assert not dense.cost.refusal


def test_what_is_not_understood_says_where_it_ended() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    (trace,) = traces_of(program, *operands(), torch.randn(N, N))
    assert isinstance(trace.lifted, Rejection)
    assert isinstance(trace.decision, Rejection)
    assert [name for name, _ in trace.seconds] == ["find", "lift"]
    assert trace.readings == trace.proposals == ()


def test_a_threshold_is_read_both_ways() -> None:
    (trace,) = traces_of(threshold, *operands(), torch.randn(1, 2, N, N), decide="sparse")
    lists, tensor = trace.readings
    assert lists.mask.selection is not None
    assert tensor.mask.selection is None
    assert [way.cost.name for way in trace.proposals] == ["lists", "block-sparse", "dense"]
    assert all(way.cost.seconds > 0 for way in trace.proposals)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_mask_is_lifted_once(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is decided about it, and for all layers that share it."""
    asked: list[Any] = []
    original = driver._lift

    def counted(*args: Any) -> LiftedMask:
        asked.append(args)
        return original(*args)

    monkeypatch.setattr(driver, "_lift", counted)

    def program(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        mask = gate >= gate.topk(60, -1).values[..., -1:]
        for _ in range(layers):
            q = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return q

    found = traces_of(program, *operands(), torch.randn(1, 2, N, N), decide="sparse")
    assert len(asked) == 1
    assert len(found) == layers
    for trace in found:
        assert trace.proposals[0].cost.refusal.startswith("it keeps 60 of 128 keys")
        assert isinstance(trace.decision, Plan)
        assert trace.decision.lifted.dense


def test_a_target_that_is_not_here() -> None:
    gpu = Target("cuda", "sm_90", 132)
    (trace,) = traces_of(window, *operands(), target=gpu, decide="sparse")
    assert isinstance(trace.decision, Plan)
    assert trace.decision.executor == "triton"
    assert trace.target == gpu


@pytest.mark.parametrize(("width", "blocks"), [(1500, (192, 128)), (128, (64, 64))])
def test_block_shapes_follow_what_kernels_there_are(width: int, blocks: tuple[int, int]) -> None:
    """Long lists get the blocks of the forward in Gluon; those of a narrow window are smaller."""

    def banded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(2048)[:, None], torch.arange(2048)
        mask = (j <= i) & (i - j < width)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    given = [torch.randn(1, 16, 2048, 64, dtype=torch.bfloat16) for _ in range(3)]
    gpu = Target("cuda", "sm_90", 132)
    with torch.no_grad():
        (trace,) = traces_of(banded, *given, target=gpu, decide="sparse")
    assert isinstance(trace.decision, Plan)
    spec = trace.decision.spec
    assert (spec.block_q, spec.block_kv) == blocks
    kernel = KernelSpec(spec, 64, 64, "bfloat16", "sm_90")
    assert generators().choose(kernel).generator == ("gluon" if blocks[0] == 192 else "triton")

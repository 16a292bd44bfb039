"""Which nodes write to which: one analysis, for the finder and the lifter."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import checkpoint

from sparse_compile.passes.mutation import written_inputs
from tests.passes.capture import capture_one


def call(make: Callable[[Graph, Node], Node]) -> tuple[Node, Node]:
    graph = Graph()
    x = graph.placeholder("x")
    return make(graph, x), x


WRITES: dict[str, Callable[[Graph, Node], Node]] = {
    "setitem": lambda g, x: g.call_function(operator.setitem, (x, 0, 1)),
    "__setitem__": lambda g, x: g.call_method("__setitem__", (x, 0, 1)),
    "ior": lambda g, x: g.call_function(operator.ior, (x, x)),
    "method_": lambda g, x: g.call_method("masked_fill_", (x, x, 0)),
    "torch.relu_": lambda g, x: g.call_function(torch.relu_, (x,)),
    "inplace by position": lambda g, x: g.call_function(F.relu, (x, True)),
    "inplace by keyword": lambda g, x: g.call_function(F.relu, (x,), {"inplace": True}),
    "out": lambda g, x: g.call_function(torch.add, (1, 2), {"out": x}),
    "overload": lambda g, x: g.call_function(torch.ops.aten.add_.Tensor, (x, 1)),
    "packet": lambda g, x: g.call_function(torch.ops.aten.add_, (x, 1)),
    "module": lambda g, x: g.call_module("unknown", (x,)),
}
READS: dict[str, Callable[[Graph, Node], Node]] = {
    "and_": lambda g, x: g.call_function(operator.and_, (x, x)),
    "__and__": lambda g, x: g.call_method("__and__", (x, x)),
    "inplace=False": lambda g, x: g.call_function(F.relu, (x, False)),
    "overload": lambda g, x: g.call_function(torch.ops.aten.add.Tensor, (x, 1)),
    "method": lambda g, x: g.call_method("masked_fill", (x, x, 0)),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.filterwarnings("ignore:Attempted to insert a call_module")
def test_writes(name: str) -> None:
    node, x = call(WRITES[name])
    assert x in written_inputs(node)


@pytest.mark.parametrize("name", READS)
def test_only_reads(name: str) -> None:
    node, _ = call(READS[name])
    assert written_inputs(node) == ()


def checkpoint_call(body: Callable[..., torch.Tensor]) -> tuple[Node, GraphModule]:
    def program(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return checkpoint(body, x * 1, y * 1, use_reentrant=False)

    gm = capture_one(program, torch.randn(4, requires_grad=True), torch.randn(4)).gm
    (node,) = (n for n in gm.graph.nodes if "checkpoint" in str(n.target))
    return node, gm


def test_a_body_writes_only_to_what_it_overwrites() -> None:
    node, _ = checkpoint_call(lambda x, y: x + y.view(2, 2).mul_(2).view(4))
    (written,) = written_inputs(node)
    assert written in node.args
    assert not written.meta["example_value"].requires_grad


def test_a_body_that_only_reads_writes_nothing() -> None:
    node, _ = checkpoint_call(lambda x, y: x + y * 2)
    assert written_inputs(node) == ()


def test_a_body_whose_inputs_cannot_be_told_apart_writes_to_all() -> None:
    node, _ = checkpoint_call(lambda x, y: x + y.mul_(2))
    node.args = (*node.args, node.args[-1])
    assert set(written_inputs(node)) == set(node.all_input_nodes)

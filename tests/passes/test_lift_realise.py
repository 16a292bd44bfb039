"""Tables as nodes of the captured graph, which still runs, compiles and gives the tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import checkpoint

from sparse_compile.options import Options
from sparse_compile.passes.lift import LiftCache, lift_mask
from sparse_compile.passes.rewrite.tables import RealisedTables, realise
from sparse_compile.sites.site import AttentionSite, LiftedMask
from tests.passes.lifting import attend, sites

N = 12


def masked(x: Tensor, pad: Tensor, doc: Tensor) -> Tensor:
    i = torch.arange(x.shape[2])
    same = (doc[:, :, None] == doc[:, None])[:, None]
    return attend(x, same & pad.bool()[:, None, None] & (i[None] <= i[:, None] + (x.shape[2] // 3)))


def with_checkpoint(x: Tensor, pad: Tensor, doc: Tensor) -> Tensor:
    i = torch.arange(x.shape[2])
    mask = (doc[:, :, None] == doc[:, None])[:, None] & pad.bool()[:, None, None]
    mask = mask & (i[None] <= i[:, None] + 2)

    def block(x: Tensor, mask: Tensor) -> Tensor:
        return attend(attend(x, mask), mask)

    return checkpoint(block, x * 2, mask, use_reentrant=False)


def literal(x: Tensor, pad: Tensor, doc: Tensor) -> Tensor:
    """A table that reads no input: noise that has no structure, as a constant."""
    lengths = torch.tensor([3, 9, 2, 7, 1, 5, 8, 4, 6, 2, 3, 7])
    return attend(x, torch.arange(x.shape[2]) <= lengths[:, None])


def replace_mask(gm: GraphModule, site: AttentionSite, found: LiftedMask, cache: Any) -> None:
    """Add to the attention's result something that reads every table and size, and is zero."""
    tables, values = realise(found, site.scope, cache)
    graph = site.scope.gm.graph
    node = site.output.node
    users = list(node.users)
    with graph.inserting_after(node):
        result = graph.call_function(add_nothing, (node, tables, values))
    result.meta["example_value"] = node.meta["example_value"]
    for user in users:
        user.replace_input_with(node, result)


def add_nothing(out: Tensor, tables: Sequence[Tensor], values: Sequence[int]) -> Tensor:
    for table in tables:
        out = out + 0.0 * table.sum()
    for value in values:
        out = out + 0.0 * value
    return out


def compiling_with(inner: Callable[..., Any], seen: list[list[Node]]) -> Callable[..., Any]:
    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        cache, lifts = RealisedTables(), LiftCache()
        for site in sites(gm):
            found = lift_mask(site, inputs, Options(), lifts)
            assert isinstance(found, LiftedMask), found
            replace_mask(gm, site, found, cache)
            seen.append(realise(found, site.scope, cache)[0])
        gm.graph.lint()
        for site in sites(gm):
            site.scope.gm.graph.lint()
            site.scope.gm.recompile()
        gm.recompile()
        return inner(gm, inputs)

    return backend


def inductor(gm: GraphModule, inputs: Sequence[Any]) -> Any:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, list(inputs))


def aot_eager(gm: GraphModule, inputs: Sequence[Any]) -> Any:
    return aot_autograd(fw_compiler=lambda graph, _: graph.forward)(gm, inputs)


@pytest.mark.parametrize(
    ("run", "dynamic", "compiler"),
    [
        *(
            (run, dynamic, aot_eager)
            for run in (masked, with_checkpoint)
            for dynamic in (False, True)
        ),
        (with_checkpoint, True, inductor),
    ],
)
def test_compiles_and_computes(
    run: Callable[..., Tensor], dynamic: bool, compiler: Callable[..., Any]
) -> None:
    torch._dynamo.reset()
    seen: list[list[Node]] = []
    compiled = torch.compile(run, backend=compiling_with(compiler, seen), dynamic=dynamic)
    for n in (N, 18) if dynamic else (N,):
        x = torch.randn(3, 2, n, 4, requires_grad=True)
        pad = torch.ones(3, n, dtype=torch.long)
        doc = torch.arange(n).expand(3, n) // 5
        expected = run(x, pad, doc)
        actual = compiled(x, pad, doc)
        torch.testing.assert_close(actual, expected)
        wanted = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(torch.autograd.grad(actual.square().sum(), x), wanted)
    # One compilation, and both attentions of the checkpoint read the same nodes.
    assert len(seen) == (2 if run is with_checkpoint else 1)
    assert all(tables == seen[0] for tables in seen)
    assert all("example_value" in node.meta for tables in seen for node in tables)


def test_tables_without_inputs_stand_after_the_placeholders() -> None:
    torch._dynamo.reset()
    seen: list[list[Node]] = []
    compiled = torch.compile(literal, backend=compiling_with(aot_eager, seen))
    x = torch.randn(1, 2, N, 4)
    torch.testing.assert_close(compiled(x, x, x), literal(x, x, x))
    assert seen[0]


def test_the_table_is_what_the_leaf_was_before_a_later_write() -> None:
    def run(x: Tensor, seen: Tensor) -> Tensor:
        mask = (torch.arange(N) <= seen).expand(N, N)
        seen.add_(1)
        return attend(x, mask)

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        (site,) = sites(gm)
        found = lift_mask(site, inputs, Options(), LiftCache())
        assert isinstance(found, LiftedMask), found
        (table,), _ = realise(found, site.scope, RealisedTables())
        with gm.graph.inserting_before(site.output.node):
            shown = gm.graph.call_method(
                "expand", (table, *site.output.node.meta["example_value"].shape)
            )
        shown.meta["example_value"] = site.output.node.meta["example_value"].long()
        site.output.node.replace_all_uses_with(shown)
        gm.recompile()
        return aot_eager(gm, inputs)

    torch._dynamo.reset()
    seen = torch.tensor(5)
    out = torch.compile(run, backend=backend)(torch.randn(1, 1, N, 4), seen)
    assert int(seen) == 6
    assert out.unique().tolist() == [5]

"""Capturing a function's graph and lifting the mask of its attention, for tests of lift_mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from sparse_compile.expr import evaluate
from sparse_compile.options import Options
from sparse_compile.passes.dense_tables import mask_data
from sparse_compile.passes.find import find_attention
from sparse_compile.passes.lift import LiftCache, lift_mask
from sparse_compile.sites.site import AttentionSite, LiftedMask, Rejection


@dataclass(frozen=True)
class Captured:
    """A Dynamo graph and the inputs it was given."""

    gm: GraphModule
    inputs: Sequence[Any]


def capture(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> Captured:
    """The one graph of a call."""
    seen: list[Captured] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(Captured(gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    assert len(seen) == 1
    return seen[0]


def sites(gm: GraphModule) -> list[AttentionSite]:
    """Every attention of a graph; none may be refused."""
    found = find_attention(gm)
    assert all(isinstance(site, AttentionSite) for site in found), found
    return [site for site in found if isinstance(site, AttentionSite)]


def lift(
    captured: Captured, site: AttentionSite | None = None, **options: Any
) -> LiftedMask | Rejection:
    """lift_mask with a fresh cache, on the first attention if no site is given."""
    site = site or sites(captured.gm)[0]
    return lift_mask(site, captured.inputs, Options(**options), LiftCache())


def lifted(
    function: Callable[..., Any], *args: Any, dynamic: bool = False, **options: Any
) -> LiftedMask:
    """The lifted mask of a function's first attention, which must not be refused."""
    found = lift(capture(function, *args, dynamic=dynamic), **options)
    assert isinstance(found, LiftedMask), found
    return found


def refused(
    function: Callable[..., Any], *args: Any, dynamic: bool = False, **options: Any
) -> Rejection:
    """Why the mask of a function's first attention is left alone; never for a mistake of ours."""
    found = lift(capture(function, *args, dynamic=dynamic), **options)
    assert isinstance(found, Rejection), found
    assert "internal" not in found.reason, found
    return found


def _argument(args: Mapping[str, Tensor], placeholder: str) -> Tensor:
    """The argument that a placeholder stands for; older torch numbers those of ``*args``."""
    name = placeholder.removeprefix("L_").removesuffix("_")
    number = name.removeprefix("args_")
    return list(args.values())[int(number)] if name != number else args[name]


def rebound(captured: Captured, args: Mapping[str, Tensor], number: int = 0) -> dict[Node, Any]:
    """Values of a graph's inputs for other arguments, given by name; sizes follow.

    ``number`` is for an integer argument, if there is one.
    """
    holders = [node for node in captured.gm.graph.nodes if node.op == "placeholder"]
    values: dict[Node, Any] = {}
    symbols: dict[str, int] = {}
    for node in holders:
        fake = node.meta["example_value"]
        if isinstance(fake, Tensor):
            values[node] = _argument(args, str(node.target))
            for size, number in zip(fake.shape, values[node].shape, strict=True):
                symbols[str(size)] = number
    for node in holders:
        fake = node.meta["example_value"]
        if not isinstance(fake, Tensor):
            values[node] = symbols.get(str(fake), number)
    return values


def run_program(
    found: LiftedMask, values: Mapping[Node, Any], n_q: int, n_kv: int
) -> tuple[list[Tensor], list[int]]:
    """Tables and sizes for given values of the leaves."""
    if found.program is None:
        return [], []
    outputs = Interpreter(found.program).run(*(values[leaf] for leaf in found.leaves))
    tables, sizes = mask_data(found, outputs, n_q, n_kv)
    for table, name in zip(tables, found.mask.tables, strict=True):
        assert table.is_contiguous()
        assert str(table.dtype) == f"torch.{name}"
    return tables, sizes


def evaluated(
    found: LiftedMask, values: Mapping[Node, Any], shape: tuple[int, int, int, int]
) -> Tensor:
    """The lifted predicate as a bool tensor [B, H, Nq, Nkv]."""
    batch, heads, n_q, n_kv = shape
    tables, sizes = run_program(found, values, n_q, n_kv)
    coordinates = {
        "b": torch.arange(batch)[:, None, None, None],
        "h": torch.arange(heads)[:, None, None],
        "q": torch.arange(n_q)[:, None],
        "kv": torch.arange(n_kv),
    }
    return evaluate(found.mask, coordinates, n_q, n_kv, tables, sizes).expand(shape)


def attend(x: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
    """SDPA of x [B, H, N, D] with itself."""
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask, **kwargs)


def eager(x: Tensor, masked: Callable[[Tensor], Tensor]) -> Tensor:
    """Eager attention of x [B, H, N, D] with itself; ``masked`` masks the scores."""
    scores = (x @ x.transpose(-1, -2)) * 0.5
    return torch.softmax(masked(scores), dim=-1) @ x

"""What a site claims, computed from its operands alone, next to what the program computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from sparse_compile.expr import (
    COORDINATES,
    ScoreData,
    ScoreProgram,
    evaluate_score,
    grid,
    learned,
)
from sparse_compile.passes.find import find_attention
from sparse_compile.sites.operands import MaskOperand, Operand
from sparse_compile.sites.site import AttentionSite, Rejection
from tests.passes.capture import Captured

Found = tuple[AttentionSite | Rejection, ...]


@dataclass(frozen=True)
class Comparison:
    """The site's meaning and the program's value, both in the layout of the site's output."""

    site: AttentionSite
    claimed: Tensor
    computed: Tensor


def sites(found: Found) -> tuple[AttentionSite, ...]:
    return tuple(site for site in found if isinstance(site, AttentionSite))


def rejections(found: Found) -> tuple[Rejection, ...]:
    return tuple(rejection for rejection in found if isinstance(rejection, Rejection))


def compare(captured: Captured) -> tuple[Comparison, ...]:
    """Run the captured graph, and each site next to it, at the moment its output is computed."""
    found = sites(find_attention(captured.gm))
    runner = _Runner(captured.gm, found)
    with torch.set_grad_enabled(captured.grad):
        runner.run(*captured.inputs)
    assert len(runner.comparisons) == len(found)
    return tuple(runner.comparisons)


class _Runner(Interpreter):
    def __init__(self, gm: torch.fx.GraphModule, found: tuple[AttentionSite, ...]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.found = found
        self.outputs = {site.output.node: site for site in found}
        self.comparisons: list[Comparison] = []

    def run_node(self, node: Node) -> Any:
        site = self.outputs.get(node)
        claimed = None if site is None else attention_of(site, self.env)
        inner = {site.scope.gm for site in self.found if site.scope.call is node}
        for gm in inner:
            runner = _Runner(gm, tuple(s for s in self.found if s.scope.gm is gm))
            runner.run(*(self.env[n] for n in runner.found[0].scope.inputs))
            self.comparisons += runner.comparisons
        computed = super().run_node(node)
        if site is not None and claimed is not None:
            self.comparisons.append(Comparison(site, claimed, computed.detach().clone()))
        return computed


def attention_of(site: AttentionSite, env: dict[Node, Any]) -> Tensor:
    """softmax(scale q k^T, with operands and masked) v in float64, from the values of operands."""
    q, k, v = (_bhnd(operand, env) for operand in (site.q, site.k, site.v))
    group = q.shape[1] // k.shape[1]
    heads = torch.arange(q.shape[1]) // group
    scale = env[site.scale] if isinstance(site.scale, Node) else site.scale
    scores = (q @ k[:, heads].mT) * scale
    given = [_spread(mask, site, env[mask.node].detach(), scores) for mask in site.masks]
    scores = _changed(site, scores, given)
    if site.causal:
        below = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~below, -math.inf)
    for mask, value in zip(site.masks, given, strict=True):
        if mask.role in ("keep", "drop"):
            fill = env[mask.fill] if isinstance(mask.fill, Node) else mask.fill
            masked = ~value if mask.role == "keep" else value
            assert masked.dtype is torch.bool
            fill = torch.as_tensor(mask.changed(float(fill)), dtype=torch.float64)
            scores = torch.where(masked, fill, scores)
    columns = 0
    if site.sinks is not None:
        sinks = env[site.sinks].detach().double()
        for position, axis in enumerate(("b", "h")):
            if axis not in site.score_axes:
                sinks = sinks.unsqueeze(position)
        columns = sinks.shape[-1]
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], columns)], -1)
    weights = scores.softmax(-1)[..., : scores.shape[-1] - columns]
    if site.kind == "sdpa" or site.zeroed:
        weights = weights.nan_to_num(0.0)
    return _arranged(weights @ v[:, heads], site.output)


def _changed(site: AttentionSite, scores: Tensor, given: list[Tensor]) -> Tensor:
    """The score program, each marker reading the operand it stands for, pair by pair."""
    if site.score is None:
        return scores
    marks = {learned(i)(): learned(i)(*COORDINATES) for i in range(len(given))}
    axes = {
        name: range(size) for name, size in zip(("b", "h", "q", "kv"), scores.shape, strict=True)
    }
    data = ScoreData(grid(scores.device, **axes), learned=given)
    return evaluate_score(ScoreProgram(site.score.value.xreplace(marks)), scores, data)


def _spread(mask: MaskOperand, site: AttentionSite, value: Tensor, scores: Tensor) -> Tensor:
    """An operand as [b, h, q, kv]."""
    axes = mask.axes or site.score_axes
    batch, heads, n_q, n_kv = scores.shape
    sizes = {"b": batch, "h": heads, "bh": batch * heads, "q": n_q, "kv": n_kv}
    for axis, size in zip(axes, mask.sizes, strict=False):
        if axis not in sizes:
            sizes[axis] = int(size)
    value = value.expand([sizes[axis] for axis in axes])
    for position, axis in ((0, "b"), (1, "h")):
        if axis not in "".join(axes):
            value = value.unsqueeze(position)
            sizes[axis] = 1
    return value.reshape(-1, heads if "h" in "".join(axes) else 1, n_q, n_kv).expand_as(scores)


def _bhnd(operand: Operand, env: dict[Node, Any]) -> Tensor:
    value = env[operand.node].detach().double()
    assert value.ndim == len(operand.axes)
    axes = list(operand.axes)
    if "bh" in axes:
        at = axes.index("bh")
        value = value.unflatten(at, (-1, int(operand.split[1])))
        axes[at : at + 1] = ["b", "h"]
    present = [axis for axis in ("b", "b1", "b2", "h", "h1", "h2", "n", "d") if axis in axes]
    value = value.permute([axes.index(axis) for axis in present])
    for outer, inner in (("b1", "b2"), ("h1", "h2")):
        if inner in present:
            at = present.index(outer)
            value = value.flatten(at, at + 1)
            present[at : at + 2] = [outer[0]]
    for position, axis in enumerate(("b", "h")):
        if axis not in "".join(present):
            value = value.unsqueeze(position)
    return value


def _arranged(out: Tensor, output: Operand) -> Tensor:
    present = ["b", "h", "n", "d"]
    shape = output.node.meta["example_value"].shape
    for outer, inner in (("b1", "b2"), ("h1", "h2")):
        if inner in output.axes:
            at = present.index(outer[0])
            out = out.unflatten(at, (-1, int(shape[output.axes.index(inner)])))
            present[at : at + 1] = [outer, inner]
    for axis in ("h", "b"):
        if axis in present and axis not in output.axes:
            out = out.squeeze(present.index(axis))
            present.remove(axis)
    return out.permute([present.index(axis) for axis in output.axes])

"""What a site claims, computed from its operands alone, next to what the program computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from sparse_compile.expr import evaluate_score
from sparse_compile.passes.find import find_attention
from sparse_compile.sites.site import AttentionSite, Operand, Rejection
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
    """softmax(scale q k^T, masked) v in float64, from the values of the site's operands."""
    q, k, v = (_bhnd(operand, env) for operand in (site.q, site.k, site.v))
    group = q.shape[1] // k.shape[1]
    heads = torch.arange(q.shape[1]) // group
    scale = env[site.scale] if isinstance(site.scale, Node) else site.scale
    scores = (q @ k[:, heads].mT) * scale
    if site.plain_score is not None:
        scores = evaluate_score(site.plain_score, scores)
    axes = [("b", "h", "q", "kv").index(axis) for axis in site.score_axes]
    for axis in sorted({0, 1, 2, 3} - set(axes), reverse=True):
        scores = scores.squeeze(axis)
    if site.causal:
        below = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~below, -math.inf)
    for mask in site.masks:
        value = env[mask.node].detach()
        if mask.role == "add":
            for change in mask.then:
                value = value * change.times
            scores = scores + value
            continue
        if mask.role == "factor":
            scores = (
                scores / value
                if site.score.value.has(1 / site.score.lookups[0])
                else scores * value
            )
            continue
        fill = env[mask.fill] if isinstance(mask.fill, Node) else mask.fill
        masked = ~value if mask.role == "keep" else value
        assert masked.dtype is torch.bool
        scores = torch.where(masked, torch.as_tensor(fill, dtype=torch.float64), scores)
    columns = 0
    if site.sinks is not None:
        sinks = env[site.sinks].detach().double()
        columns = sinks.shape[-1]
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], columns)], -1)
    weights = scores.softmax(-1)[..., : scores.shape[-1] - columns]
    if site.kind == "sdpa":
        weights = weights.nan_to_num(0.0)
    out = weights.reshape(*q.shape[:3], -1) @ v[:, heads]
    return _arranged(out, site.output)


def _bhnd(operand: Operand, env: dict[Node, Any]) -> Tensor:
    value = env[operand.node].detach().double()
    assert value.ndim == len(operand.axes)
    present = [axis for axis in ("b", "h", "n", "d") if axis in operand.axes]
    value = value.permute([operand.axes.index(axis) for axis in present])
    for position, axis in enumerate(("b", "h")):
        if axis not in operand.axes:
            value = value.unsqueeze(position)
    return value


def _arranged(out: Tensor, output: Operand) -> Tensor:
    for position, axis in ((1, "h"), (0, "b")):
        if axis not in output.axes:
            out = out.squeeze(position)
    present = [axis for axis in ("b", "h", "n", "d") if axis in output.axes]
    return out.permute([present.index(axis) for axis in output.axes])

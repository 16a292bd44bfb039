"""Tiles of attention by plain matrix products: of any score, on any version of PyTorch.

PyTorch's fused attention knows a scale and a bias only. These take its place, tile by tile, in
fp32; everything about which tiles there are, and how their results merge, stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.cpu.batches import Batch
from sparse_compile.codegen.cpu.bias import Bias
from sparse_compile.codegen.cpu.parts import Part
from sparse_compile.expr import COORDINATES, ScoreData, ScoreProgram, evaluate_score, evaluate_slope


@dataclass(frozen=True)
class Score:
    """What makes scores of products of queries and keys.

    Attributes:
        scale: factor on the products.
        program: what happens to them then; None: nothing.
        data: what the program reads; coordinates only where it is :meth:`at` some tiles.
    """

    scale: float
    program: ScoreProgram | None = None
    data: ScoreData = field(default_factory=ScoreData)

    @staticmethod
    def of(call: AttentionCall) -> Score:
        """The scores of a call."""
        return Score(call.scale, call.spec.score, ScoreData({}, *call.data))

    def at(self, part: Part, batch: Batch) -> Score:
        """The scores of the tiles of a batch."""
        program = self.program
        if program is None or not any(program.depends_on(symbol) for symbol in COORDINATES):
            return self
        queries, keys = batch.coordinates()
        heads = torch.tensor(list(part.heads)).view(1, -1, 1, 1)
        where = {"q": queries.unsqueeze(1), "kv": keys.unsqueeze(1), "h": heads}
        where["b"] = torch.tensor(part.batch)
        return replace(self, data=replace(self.data, coordinates=where))

    def products(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled products fp32 [tiles, heads, rows, keys] of q [..., rows, D] and k [..., keys, D].

        fp64 of fp64.
        """
        wide = torch.promote_types(q.dtype, torch.float32)
        products: Tensor = q.to(wide) @ k.to(wide).mT
        return products.mul_(self.scale)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, score: Score
) -> tuple[Tensor, Tensor]:
    """As :func:`sparse_compile.codegen.cpu.flash.forward`; ``out`` is fp32, fp64 for fp64."""
    scores = score.products(q, k)
    if score.program is not None:
        scores = evaluate_score(score.program, scores, score.data)
    if bias is not None:
        scores = scores + bias.values
    peak = scores.amax(-1, keepdim=True)
    peak.masked_fill_(peak == -torch.inf, 0.0)  # rows that see nothing here: exp(-inf - 0) = 0
    weights = (scores - peak).exp_()
    total = weights.sum(-1, keepdim=True)
    out = weights @ v.to(weights.dtype)
    out /= total.masked_fill(total == 0.0, 1.0)
    return out, (peak + total.log()).squeeze(-1)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Bias | None,
    score: Score,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`sparse_compile.codegen.cpu.flash.backward`; gradients are fp32, fp64 for fp64."""
    scores, slope = score.products(q, k), None
    if score.program is not None:
        scores, slope = evaluate_slope(score.program, scores, score.data)
    if bias is not None:
        scores = scores + bias.values
    weights = (scores - lse[..., None]).exp_()
    wide = weights.dtype
    grad = grad_out.to(wide)
    delta = (grad * out.to(wide)).sum(-1, keepdim=True)
    dv = weights.mT @ grad
    d_products = weights.mul_(grad @ v.to(wide).mT - delta)
    if slope is not None:
        d_products *= slope
    d_products *= score.scale
    return d_products @ k.to(wide), d_products.mT @ q.to(wide), dv

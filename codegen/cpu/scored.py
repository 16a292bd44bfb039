"""Tiles of attention whose score is not linear in q·k: plain matrix products around its program.

PyTorch's fused attention knows a scale and a bias only. These take its place, tile by tile, in
fp32; everything about which tiles there are, and how their results merge, stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.cpu.batches import Batch
from sparse_compile.codegen.cpu.flash import Bias
from sparse_compile.codegen.cpu.parts import Part
from sparse_compile.expr import COORDINATES, ScoreData, ScoreProgram, evaluate_score, evaluate_slope


@dataclass(frozen=True)
class ScoreCall:
    """A score program and the run-time data of one call, but for coordinates."""

    program: ScoreProgram
    scale: float
    data: ScoreData

    @staticmethod
    def make(call: AttentionCall) -> ScoreCall | None:
        """The score program of a call; None where scores are the scaled products."""
        if call.spec.score is None:
            return None
        _, _, n_q, n_kv = call.shape
        data = ScoreData({}, n_q, n_kv, call.tables, call.sizes)
        return ScoreCall(call.spec.score, call.scale, data)

    def at(self, part: Part, batch: Batch) -> TileScore:
        """The scores of the tiles of a batch."""
        if not any(self.program.depends_on(symbol) for symbol in COORDINATES):
            return TileScore(self, self.data)
        queries, keys = batch.coordinates()
        heads = torch.tensor(list(part.heads)).view(1, -1, 1, 1)
        where = {"q": queries.unsqueeze(1), "kv": keys.unsqueeze(1), "h": heads}
        where["b"] = torch.tensor(part.batch)
        return TileScore(self, replace(self.data, coordinates=where))


@dataclass(frozen=True)
class TileScore:
    """A score program at some tiles."""

    call: ScoreCall
    data: ScoreData

    def products(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled products fp32 [tiles, heads, rows, keys] of q [..., rows, D] and k [..., keys, D].

        fp64 of fp64.
        """
        wide = torch.promote_types(q.dtype, torch.float32)
        products: Tensor = q.to(wide) @ k.to(wide).mT
        return products.mul_(self.call.scale)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, score: TileScore
) -> tuple[Tensor, Tensor]:
    """As :func:`sparse_compile.codegen.cpu.flash.forward`; ``out`` is fp32, fp64 for fp64."""
    scores = evaluate_score(score.call.program, score.products(q, k), score.data)
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
    score: TileScore,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`sparse_compile.codegen.cpu.flash.backward`; gradients are fp32, fp64 for fp64."""
    scores, slope = evaluate_slope(score.call.program, score.products(q, k), score.data)
    if bias is not None:
        scores = scores + bias.values
    weights = (scores - lse[..., None]).exp_()
    wide = weights.dtype
    grad = grad_out.to(wide)
    delta = (grad * out.to(wide)).sum(-1, keepdim=True)
    dv = weights.mT @ grad
    d_products = weights.mul_(grad @ v.to(wide).mT - delta).mul_(slope)
    d_products *= score.call.scale
    return d_products @ k.to(wide), d_products.mT @ q.to(wide), dv

"""Attention of batches of small tiles, by PyTorch's fused operators: the one place that calls them.

The two operators are not public API, so everything else goes through :func:`forward` and
:func:`backward`, and ``tests/codegen/test_cpu_flash.py`` pins what is relied upon. They know a
scale and a bias only. For other scores, and where the operators are missing, plain matrix products
take their place, tile by tile, in fp32; which tiles there are, and how their results merge, stays
the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.cpu.batches import Batch, Part
from sparse_compile.codegen.cpu.bias import Bias
from sparse_compile.expr import (
    COORDINATES,
    SCORE,
    Dropout,
    ScoreData,
    ScoreProgram,
    add_learned_gradients,
    evaluate_score,
    evaluate_slope,
    is_learned,
    keeps,
)

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"


@dataclass(frozen=True)
class Score:
    """What makes scores of products of queries and keys.

    Attributes:
        scale: factor on the products.
        program: what happens to them then; None: nothing.
        data: what the program reads; coordinates only where it is :meth:`at` some tiles.
        dropout: of the weights; None: none is dropped.
        sums: to which the gradients of learned tensors are added, as in :meth:`AttentionCall.sums`.
    """

    scale: float
    program: ScoreProgram | None = None
    data: ScoreData = field(default_factory=ScoreData)
    sums: Sequence[Tensor | None] = ()
    dropout: Dropout | None = None

    @staticmethod
    def of(call: AttentionCall, wanted: Sequence[int] = ()) -> Score:
        """The scores of a call; ``wanted`` as in :class:`AttentionResult`."""
        given = call.score_data({}), call.sums(wanted), call.spec.dropout
        return Score(call.scale, call.spec.score, *given)

    @property
    def is_held(self) -> bool:
        """Whether all scores of some tiles exist at once."""
        return self.program is not None or self.dropout is not None

    def is_fused(self, q: Tensor) -> bool:
        """Whether PyTorch's operators compute them, with what is added in q's dtype."""
        if self.dropout is not None:
            return False
        if self.program is None:
            return True
        if self.program.derivative != 1 or self.program.absorbed:
            return False
        # A sum, or anything computed, is rounded to half precision, where the program's own is not.
        read = is_learned(self.program.value - SCORE)
        return q.dtype == torch.float32 or (
            read and all(t.dtype == q.dtype for t in self.data.learned)
        )

    def learned_gradients(self) -> list[Tensor]:
        """The sums that there are, in the dtypes of the learned tensors."""
        pairs = zip(self.sums, self.data.learned, strict=True)
        return [total.to(t.dtype) for total, t in pairs if total is not None]

    def at(self, part: Part, batch: Batch) -> Score:
        """The scores of the tiles of a batch."""
        program = self.program
        placed = program is not None and any(map(program.depends_on, COORDINATES))
        if not placed and self.dropout is None:
            return self
        queries, keys = batch.coordinates()
        heads = torch.tensor(list(part.heads)).view(1, -1, 1, 1)
        where = {"q": queries.unsqueeze(1), "kv": keys.unsqueeze(1), "h": heads}
        where["b"] = torch.tensor(part.batch)
        return replace(self, data=replace(self.data, coordinates=where))


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles of queries, each with keys of its own.

    Attributes:
        q: [tiles, heads, rows, D]; any strides, the last one 1. So are ``k`` and ``v``, whose tiles
            and heads may overlap in memory.
        k: [tiles, heads, keys, D].
        v: [tiles, heads, keys, D].
        bias: who may attend; None: every query to every key.
        score: what makes the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Bias | None
    score: Score

    def products(self) -> Tensor:
        """Scaled products fp32 [tiles, heads, rows, keys]; fp64 of fp64."""
        wide = torch.promote_types(self.q.dtype, torch.float32)
        return (self.q.to(wide) @ self.k.to(wide).mT).mul_(self.score.scale)

    def added(self) -> Tensor | None:
        """What is added to the scaled products, in the dtype of q."""
        program = self.score.program
        if program is None:
            return None if self.bias is None else self.bias.values
        tiles, heads, rows, _ = self.q.shape
        nothing = torch.zeros((), dtype=torch.float32).expand(tiles, heads, rows, self.k.shape[2])
        return self.masked(evaluate_score(program, nothing, self.score.data)).to(self.q.dtype)

    def dropped(self, values: Tensor) -> Tensor:
        """Weights, or what is done to weights, by dropout."""
        score = self.score
        if score.dropout is None:
            return values
        kept = keeps(score.dropout, score.data.learned[score.dropout.seed], score.data)
        return values.masked_fill(~kept, 0.0) * score.dropout.factor

    def masked(self, scores: Tensor) -> Tensor:
        """Scores of that shape, -inf where hidden."""
        return scores if self.bias is None else scores + self.bias.values


@functools.lru_cache(maxsize=1)
def _operators() -> tuple[Any, Any] | None:
    try:
        return getattr(torch.ops.aten, _FORWARD), getattr(torch.ops.aten, _FORWARD + "_backward")
    except AttributeError:
        return None


def forward(tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Attention of each tile of queries to its own keys.

    Returns:
        out [tiles, heads, rows, D] in the dtype of q, or in fp32 by plain products, and the
        natural-log log-sum-exp [tiles, heads, rows], fp32 (fp64 for fp64 inputs): 0 and -inf on
        rows that attend to nothing.
    """
    operators, bias, score = _operators(), tiles.bias, tiles.score
    if operators is None or not score.is_fused(tiles.q):
        return _forward(tiles)
    given = tiles.q, tiles.k, tiles.v, 0.0, False
    out, lse = operators[0](*given, attn_mask=tiles.added(), scale=score.scale)
    if bias is not None and bias.empty is not None:
        # The operator's own answer for these rows differs between versions of PyTorch.
        out = out.masked_fill(bias.empty[..., None], 0.0)
        lse = lse.masked_fill(bias.empty, -math.inf)
    return out, lse


def backward(
    tiles: Tiles, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The share of these tiles in the gradients of q, k and v.

    ``out`` and ``lse`` [tiles, heads, rows] may be those of the whole rows, of which these keys are
    a part: weights are ``exp(score - lse)``. ``lse`` must be finite, also on empty rows.

    Returns:
        dq [tiles, heads, rows, D], dk and dv [tiles, heads, keys, D], in the dtype of q, or in fp32
        by plain products.
    """
    operators, score = _operators(), tiles.score
    wanted = any(total is not None for total in score.sums)
    if operators is None or wanted or not score.is_fused(tiles.q):
        return _backward(tiles, grad_out, out, lse)
    given = grad_out, tiles.q, tiles.k, tiles.v, out, lse, 0.0, False
    grads = operators[1](*given, attn_mask=tiles.added(), scale=score.scale)
    return cast(tuple[Tensor, Tensor, Tensor], grads)


def _forward(tiles: Tiles) -> tuple[Tensor, Tensor]:
    """As :func:`forward` by plain products; ``out`` is fp32, fp64 for fp64."""
    scores, score = tiles.products(), tiles.score
    if score.program is not None:
        scores = evaluate_score(score.program, scores, score.data)
    scores = tiles.masked(scores)
    peak = scores.amax(-1, keepdim=True)
    peak.masked_fill_(peak == -torch.inf, 0.0)  # rows that see nothing here: exp(-inf - 0) = 0
    weights = (scores - peak).exp_()
    total = weights.sum(-1, keepdim=True)
    out = tiles.dropped(weights) @ tiles.v.to(weights.dtype)
    out /= total.masked_fill(total == 0.0, 1.0)
    return out, (peak + total.log()).squeeze(-1)


def _backward(
    tiles: Tiles, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`backward` by plain products; gradients are fp32, fp64 for fp64."""
    products, score = tiles.products(), tiles.score
    scores, slope = products, None
    if score.program is not None:
        scores, slope = evaluate_slope(score.program, products, score.data)
    weights = (tiles.masked(scores) - lse[..., None]).exp_()
    q, k, v, grad, out = (x.to(weights.dtype) for x in (tiles.q, tiles.k, tiles.v, grad_out, out))
    delta = (grad * out).sum(-1, keepdim=True)
    dv = tiles.dropped(weights).mT @ grad
    d_products = weights.mul_(tiles.dropped(grad @ v.mT) - delta)
    if score.program is not None and any(total is not None for total in score.sums):
        add_learned_gradients(score.program, products, d_products, score.data, score.sums)
    if slope is not None:
        d_products *= slope
    d_products *= tiles.score.scale
    return d_products @ k, d_products.mT @ q, dv

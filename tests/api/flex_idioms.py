"""Masks and scores as people write them for FlexAttention, and what they mean in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_compile.flex import and_masks, noop_mask, or_masks

B, H, N, D = 2, 4, 72, 16
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Idiom:
    """A mask and a score function.

    Attributes:
        mask: the ``mask_mod``; None for no block mask.
        score: the ``score_mod``, of the dtype and the tensors that it learns.
        learned: their shapes.
        batches, heads: with masks of their own.
    """

    mask: Function | None = None
    score: Callable[..., Function] | None = None
    learned: tuple[tuple[int, ...], ...] = ()
    batches: int | None = None
    heads: int | None = None
    tensors: list[Tensor] = field(default_factory=list)


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


def window(size: int) -> Function:
    def sliding_window(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q - kv).abs() <= size

    return sliding_window


def documents(ids: Tensor) -> Function:
    def same_document(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return ids[b, q] == ids[b, kv]

    return same_document


def prefix(lengths: Tensor) -> Function:
    return lambda b, h, q, kv: kv < lengths[b]


def prefix_tree() -> Function:
    """A shared prompt, two answers to it, and an answer to the first of these."""
    segment = torch.tensor([0] * 20 + [1] * 18 + [2] * 16 + [3] * 18)
    ancestors = torch.eye(4, dtype=torch.bool)
    ancestors[1, 0] = ancestors[2, 0] = ancestors[3, 0] = ancestors[3, 1] = True
    return lambda b, h, q, kv: ancestors[segment[q], segment[kv]] & (q >= kv)


def natten(height: int, width: int, kernel: int) -> Function:
    def neighbours(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        half = kernel // 2
        row = (q // width).clamp(half, height - 1 - half)
        column = (q % width).clamp(half, width - 1 - half)
        near = (row - kv // width).abs() <= half
        return torch.logical_and(near, (column - kv % width).abs() <= half)

    return neighbours


def transfusion(starts: Tensor, ends: Tensor) -> Function:
    """Causal, but for spans of an image, which are attended to as a whole."""

    def spans(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        allowed = q >= kv
        for i in range(starts.shape[1]):
            inside = (q >= starts[b, i]) & (q < ends[b, i])
            allowed = allowed | (inside & (kv >= starts[b, i]) & (kv < ends[b, i]))
        return allowed

    return spans


def alibi() -> Function:
    def with_bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return score + torch.exp2(-((h + 1) * 8.0 / H)) * (kv - q)

    return with_bias


def slopes(values: Tensor) -> Function:
    return lambda score, b, h, q, kv: score - values[h] * (q - kv).abs()


def softcap(cap: float) -> Function:
    return lambda score, b, h, q, kv: cap * torch.tanh(score / cap)


def relative(table: Tensor) -> Function:
    return lambda score, b, h, q, kv: score + table[h, q - kv + N - 1]


def t5(table: Tensor) -> Function:
    def bucket(distance: Tensor) -> Tensor:
        half, reach = 8, 64
        later = (distance > 0).to(torch.long) * 16
        distance = torch.abs(distance)
        far = torch.log(distance.float() / half) / math.log(reach / half) * half
        far = torch.min(half + far.to(torch.long), torch.full_like(distance, 15))
        return later + torch.where(distance < half, distance, far)

    return lambda score, b, h, q, kv: score + table[bucket(kv - q), h]


def swin(table: Tensor) -> Function:
    """The distance of two places of a grid of 8 rows, for each head."""
    width = N // 8
    index = torch.arange(8)[:, None] - torch.arange(8) + 7
    return lambda score, b, h, q, kv: score + table[index[q // width, kv // width], h]


def causal_score() -> Function:
    return lambda score, b, h, q, kv: torch.where(q >= kv, score, -float("inf"))


def gated(temperature: Tensor, bias: Tensor) -> Function:
    def both(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        score = score * torch.sigmoid(temperature[h]) + bias[b, kv]
        return score.masked_fill((q - kv) % 3 == 1, float("-inf"))

    return both


_IDS = torch.tensor([[0] * 30 + [1] * 42, [0] * 11 + [1] * 40 + [2] * 21])
_STARTS, _ENDS = torch.tensor([[4, 40], [9, 50]]), torch.tensor([[20, 60], [12, 72]])

MASKS: dict[str, Idiom] = {
    "everything": Idiom(noop_mask),
    "none": Idiom(),
    "causal": Idiom(causal),
    "window": Idiom(and_masks(causal, window(9))),
    "window of a tensor": Idiom(lambda b, h, q, kv: (q >= kv) & (q - kv < torch.tensor(7))),
    "windows per head": Idiom(
        (lambda sizes: lambda b, h, q, kv: (q - kv).abs() <= sizes[h])(torch.tensor([1, 5, 9, 70])),
        heads=H,
    ),
    "documents": Idiom(and_masks(causal, documents(_IDS)), batches=B),
    "prefix": Idiom(or_masks(causal, prefix(torch.tensor([5, 31]))), batches=B),
    "prefix tree": Idiom(prefix_tree()),
    "natten": Idiom(natten(8, 9, 5)),
    "dilated": Idiom(lambda b, h, q, kv: (q >= kv) & ((q - kv) % 4 == 0)),
    "global and window": Idiom(or_masks(window(4), lambda b, h, q, kv: (q < 3) | (kv < 3))),
    "images": Idiom(transfusion(_STARTS, _ENDS), batches=B),
    "empty rows": Idiom(lambda b, h, q, kv: q - kv > 5),
    "halves": Idiom(lambda b, h, q, kv: kv <= q / 2 + 3),
}
SCORES: dict[str, Idiom] = {
    "alibi": Idiom(causal, alibi),
    "learned slopes": Idiom(causal, slopes, ((H,),)),
    "softcap": Idiom(and_masks(causal, window(9)), lambda: softcap(3.0)),
    "relative": Idiom(documents(_IDS), relative, ((H, 2 * N - 1),), batches=B),
    "t5": Idiom(None, t5, ((32, H),)),
    "swin": Idiom(window(20), swin, ((15, H),)),
    "causal in the score": Idiom(None, causal_score),
    "gated": Idiom(window(30), gated, ((H,), (B, N))),
    "all pairs": Idiom(
        causal, lambda table: lambda s, b, h, q, kv: s + table[b, h, q, kv], ((B, H, N, N),)
    ),
}


def places(n_q: int = N, n_kv: int = N) -> list[Tensor]:
    """Coordinates that broadcast to [B, H, n_q, n_kv]."""
    sizes = B, H, n_q, n_kv
    shapes = ([-1 if i == axis else 1 for i in range(4)] for axis in range(4))
    return [torch.arange(n).view(shape) for n, shape in zip(sizes, shapes, strict=True)]


def dense(
    operands: tuple[Tensor, Tensor, Tensor],
    mask: Function | None,
    score: Function | None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, in the dtype of the operands; all pairs at once."""
    q, k, v = operands
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    at = places(q.shape[2], k.shape[2])
    scores: Any = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if score is None else score(scores, *at)
    keep = torch.ones(1, dtype=torch.bool) if mask is None else mask(*at)
    scores = torch.where(keep, scores, -math.inf)
    weights = torch._safe_softmax(scores, -1).to(v.dtype)
    return weights @ v, scores.logsumexp(-1)

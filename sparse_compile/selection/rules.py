"""Rules: which blocks are selected, from their scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.patterns.scored import Threshold, TopK, TopP, TopRatio, exact

#: Below the key of every block that can be selected.
_NEVER = -(1 << 63)


@dataclass(frozen=True)
class Candidates:
    """Blocks that units of queries may select; the last dimension is the blocks.

    Attributes:
        scores: fp32 [B, Hs, U, blocks].
        visible: bool, broadcasts to it: what the mask may show.
        forced: bool, likewise: what is selected whatever its score.
    """

    scores: Tensor
    visible: Tensor
    forced: Tensor

    def shares(self) -> Tensor:
        """fp32 [B, Hs, U, blocks]: the softmax over what is visible; infinities share the whole."""
        counted = self.visible & (self.scores > -math.inf)
        scores = self.scores.masked_fill(~counted, -math.inf)
        top = scores.amax(-1, keepdim=True)
        # A difference of infinities is NaN, and of equals zero.
        weight = torch.where(scores == top, 0, scores - top).exp().masked_fill(~counted, 0)
        return weight / weight.sum(-1, keepdim=True).clamp(min=1)

    def best(self, most: int) -> Best:
        """The first ``most`` in the order of selection: forced, then by score, then by number."""
        bits = (self.scores + 0.0).view(torch.int32)  # which makes -0.0 equal to 0.0
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
        ordered = ordered.masked_fill(self.forced, 0x7FFFFFFF)
        blocks = self.scores.shape[-1]
        number = torch.arange(blocks, device=self.scores.device)
        # No two keys are equal, so which are the greatest, and in what order, is unique.
        key = (ordered.long() << 32) + (blocks - 1 - number)
        # Comparing with NaN gives False.
        possible = self.visible & (self.forced | (self.scores > -math.inf))
        key = key.masked_fill(~possible, _NEVER)
        top = key.topk(most, sorted=True)
        forced = self.forced.expand(key.shape).gather(-1, top.indices)
        return Best(self, top.indices, top.values > _NEVER, forced)


@dataclass(frozen=True)
class Best:
    """The best candidates in order; [B, Hs, U, K] each.

    Attributes:
        candidates: what they were chosen from.
        block: int64; which they are.
        exists: bool; False where a row has fewer than K.
        forced: bool; always selected if they exist.
    """

    candidates: Candidates
    block: Tensor
    exists: Tensor
    forced: Tensor

    @property
    def rank(self) -> Tensor:
        """int64 [K]: 0, 1, ..."""
        return torch.arange(self.block.shape[-1], device=self.block.device)

    def of(self, values: Tensor) -> Tensor:
        """The values of these blocks, of values [B, Hs, U, blocks]."""
        return values.gather(-1, self.block)


def kept(rule: Any, best: Best) -> Tensor:
    """Which of the best the rule selects, besides forced ones: bool, broadcasts to [B, Hs, U, K].

    Forced ones stand first, so a rule that counts or adds up counts them.
    """
    found = best.candidates
    match rule:
        case TopK():
            return best.rank < by_head(rule.k, best.rank)
        case TopRatio():
            visible = found.visible.expand(found.scores.shape).sum(-1, keepdim=True)
            ratios = map(exact, _each(rule.ratio))
            over, under = (by_head(part, visible) for part in zip(*ratios, strict=True))
            rounded_up = torch.div(visible * over + (under - 1), under, rounding_mode="floor")
            return best.rank < rounded_up
        case TopP():
            shares = best.of(found.shares()).double()
            before = shares.cumsum(-1) - shares
            # Where all is wanted, a sum that rounding makes too large must not leave out the last.
            wanted = tuple(math.inf if p == 1 else p for p in _each(rule.p))
            return before < by_head(wanted, before)
        case Threshold():
            values = found.shares() if rule.of == "softmax" else found.scores
            return best.of(values) >= by_head(rule.t, values)
    raise TypeError(f"no rule for {rule!r}")


def by_head(value: Any, like: Tensor) -> Tensor:
    """A parameter, or one for each list, as a tensor [1 or Hs, 1, 1] of the dtype of ``like``."""
    # Filling waits for nothing, unlike a copy from the host.
    return torch.stack([like.new_full((1, 1), item) for item in _each(value)])


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def ascending(rule: Any, best: Best, blocks: int) -> tuple[Tensor, Tensor]:
    """What the rule selects: int32 lists [B, Hs, U, K], ascending, and how long they are.

    Beyond its end a list holds ``blocks``.
    """
    selected = best.exists & (best.forced | kept(rule, best))
    index = torch.where(selected, best.block, blocks).to(torch.int32).sort(-1).values
    return index, selected.sum(-1, dtype=torch.int32)

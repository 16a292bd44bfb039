"""Which masks hide a pair, and what its score is then: of rows that see no key, what is left.

A program may mask more than once, with different numbers. What a hidden pair is left with depends
on which masks hide it: ``finfo.min`` where one that adds it does, ``-inf`` where two do, and what
the last one says where that takes the place of the score.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch

from sparse_compile.passes.lift.masks import Keep, SiteMasks, fill_kind
from sparse_compile.passes.lift.simplify import Simplifier
from sparse_compile.passes.lift.value import ABSORBING
from sparse_compile.sites.operands import Change
from sparse_compile.sites.site import Refused

_MOST_STATES = 64


@dataclass(frozen=True)
class State:
    """Pairs that the same masks hide in the same way.

    Attributes:
        fills: the number by which each operand hides them; None: it does not.
        condition: which pairs these are, over ``b, h, q, kv``.
        score: what their score is, in a row of these alone; None: that depends on what it would be
            otherwise.
        centred: what it was when the maximum of such a row, itself, was subtracted from it; None:
            it was not.
        shares: how much of the gradient of that reaches the scaled products; then what each operand
            adds.
    """

    fills: tuple[float | None, ...]
    condition: sympy.Basic
    score: float | None
    shares: tuple[float, ...]
    centred: float | None = None

    @property
    def first(self) -> int:
        """The first operand that hides them."""
        return next(i for i, fill in enumerate(self.fills) if fill is not None)


def states_of(masks: SiteMasks, keeps: Sequence[Keep], simplify: Simplifier) -> tuple[State, ...]:
    """How pairs may be hidden, each way once.

    Args:
        masks: of an attention.
        keeps: what they do.
        simplify: in the ranges of the coordinates.

    Raises:
        Refused: in too many ways.
    """
    ways = [[(keep.condition, None), *keep.hidden] for keep in keeps]
    if math.prod(map(len, ways)) > _MOST_STATES:
        raise Refused("it masks in too many different ways", "combine the masks as bool tensors")
    found = []
    for way in itertools.product(*ways):
        fills = tuple(None if fill is None else float(fill) for _, fill in way)
        condition = simplify(sympy.And(*(condition for condition, _ in way)))
        if condition != sympy.false and any(fill is not None for fill in fills):
            found.append(State(fills, condition, *_followed(masks, keeps, fills)))
    return tuple(found)


def check_centred(masks: SiteMasks, keeps: Sequence[Keep], states: Sequence[State]) -> None:
    """That rows of hidden pairs are known, whose maximum was subtracted before something else.

    Raises:
        Refused: it depends on what else there is in a row what becomes of its scores.
    """
    counts = [sum(change.centred for change in operand.then) for operand in masks.site.masks]
    late = [keep for keep, n in zip(keeps, counts, strict=True) if n < max(counts)]
    several = len({state.centred for state in states}) > 1
    if several or any(keep.hidden or keep.bias is not None for keep in late):
        raise Refused(
            "the maximum of the scores is subtracted between masks, or before masked scores are "
            "raised, and rows may be fully masked: it makes them 0 or NaN",
            "leave it out: softmax ignores it",
        )


def _followed(
    masks: SiteMasks, keeps: Sequence[Keep], fills: Sequence[float | None]
) -> tuple[float | None, tuple[float, ...], float | None]:
    """The score of a hidden pair, what its gradient reaches, operand by operand, and a maximum."""
    operands, score, shares, centred = masks.site.masks, None, [1.0], None
    for at, (operand, keep, fill) in enumerate(zip(operands, keeps, fills, strict=True)):
        if fill is not None and operand.role != "add":
            score, shares = fill, [0.0] * len(shares)
        elif fill is not None:
            score = _sum(score, fill * operand.times, masks.dtype_at(at))
        elif keep.bias is not None and score is not None and score > ABSORBING:
            score = None
        shares.append(1.0)
        later = operands[at + 1].then if at + 1 < len(operands) else ()
        for change in operand.then[: len(operand.then) - len(later)]:
            centred = score if change.centred else centred
            score, shares = _changed(score, shares, change)
    # Softmax makes NaN of a row of -inf, too.
    score = -math.inf if score is not None and math.isnan(score) else score
    return score, tuple(shares), centred


def _sum(score: float | None, fill: float, dtype: torch.dtype) -> float | None:
    """What a number makes of a score that it is added to; None: that depends on the score."""
    number = torch.tensor(fill, dtype=torch.float64).to(dtype)
    if score is not None:
        return (torch.tensor(score, dtype=torch.float64).to(dtype) + number).item()
    return number.item() if fill_kind(fill, dtype) in ("inf", "absorbing") else None


def _changed(
    score: float | None, shares: list[float], change: Change
) -> tuple[float | None, list[float]]:
    """A known score after a change, and the gradient that gets through a floor."""
    if score is None:
        return None, shares
    if change.centred:
        return score - score, shares
    if math.isnan(score):
        # Of two that are compared NaN has the gradient; a clamp keeps it back.
        stays = change.shares or change.least == -math.inf
        return score, shares if stays else [0.0] * len(shares)
    before = score * change.times
    if before < change.least:
        shares = [0.0] * len(shares)
    elif before == change.least and change.shares:
        shares = [share / 2 for share in shares]
    return change(score), shares

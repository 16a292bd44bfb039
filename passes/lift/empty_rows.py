"""What a fully masked query yields in the original program, and whether there can be one.

Softmax over a row of -inf is NaN, and SDPA makes that 0. Over a row of finfo.min it is uniform: the
mean of V. Other finite fills leave masked keys a weight that depends on the scores: a bias.

Where masks differ, a row without keys attends to the hidden ones with the highest score, evenly;
the others, which are lower by more than any score, have no weight. Executors know the even mean
over all keys. What they do not know is attention of its own, for these rows alone: a *level*.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from sparse_compile.expr import KV, SCORE, Q, learned
from sparse_compile.expr.score import number
from sparse_compile.passes.lift.hidden import State, check_centred, states_of
from sparse_compile.passes.lift.masks import Keep, SiteMasks, is_trained, kind_of
from sparse_compile.passes.lift.simplify import Simplifier
from sparse_compile.sites.site import Refused
from sparse_compile.spec import EmptyRows

#: With ``finite_fill="minus_inf"``, fills up to this one count as minus infinity.
LARGEST_ASSUMED = -1e4
_FINITE_HINT = (
    'options={"finite_fill": "minus_inf"} reads fills <= -1e4 as float("-inf"), which differs from '
    "the program only where a whole row is masked"
)
_DIFFERENT = Refused(
    "it masks several times, in different ways, and rows may be fully masked: what such a row "
    "yields depends on which mask hides which key",
    "combine the masks as bool tensors before turning them into scores",
)


@dataclass(frozen=True)
class Level:
    """Hidden keys of one score, to which a query attends that sees none, and none of a higher one.

    Attributes:
        states: how they are hidden.
        condition: which pairs these are; what it says of pairs that such a query does not have does
            not matter.
        values: what the gradient of their scores follows, over ``score`` and marks of operands,
            each with the pairs it is for: the first that fits.
    """

    states: tuple[State, ...]
    condition: sympy.Basic
    values: tuple[tuple[sympy.Expr, sympy.Basic], ...]


@dataclass(frozen=True)
class Outcome:
    """What queries without keys yield.

    Attributes:
        policy: that, or what those yield that have keys at no level.
        levels: what they attend to instead, the highest first.
    """

    policy: EmptyRows
    levels: tuple[Level, ...] = ()


def never_empty(
    predicate: sympy.Basic, lengths: Mapping[sympy.Symbol, sympy.Expr], simplify: Simplifier
) -> bool:
    """Whether every query provably sees a key: itself, the first, the last or its aligned one."""
    n_q, n_kv = lengths[Q], lengths[KV]
    for key in (Q, sympy.S.Zero, n_kv - 1, Q + n_kv - n_q):
        inside = simplify.ranges.nonnegative(key) and simplify.ranges.nonnegative(n_kv - 1 - key)
        if inside and simplify(predicate.xreplace({KV: key})) == sympy.true:
            return True
    return False


def of_empty_rows(
    masks: SiteMasks,
    keeps: Sequence[Keep],
    predicate: sympy.Basic,
    simplify: Simplifier,
    finite_fill: str,
    is_linear: bool,
) -> Outcome:
    """What the program yields on fully masked rows.

    Args:
        masks: of an attention.
        keeps: what the mask operands do.
        predicate: what they say together.
        simplify: in the ranges of the coordinates.
        finite_fill: the option of that name.
        is_linear: whether scores are the scaled products and what has no gradient.

    Raises:
        Refused: when masked keys would still have weight, or it is not known what it yields.
    """
    site, nothing = masks.site, Outcome(EmptyRows.ZERO)
    if site.kind == "call":
        return nothing
    fills = {fill: kind for keep in keeps for fill, kind in _kinds(keep, masks.dtype)}
    assumed = _check_finite(fills, finite_fill)
    # With a sink, a row without keys gives all its weight to that, and yields 0.
    if assumed or site.sinks is not None or never_empty(predicate, masks.lengths, simplify):
        return nothing
    if site.zeroed == "hidden":
        return nothing
    several = site.causal + sum(bool(keep.hidden) for keep in keeps) > 1
    if several and any(keep.data for keep in keeps):
        raise _DIFFERENT  # The best of its numbers may be hidden by another mask.
    states = states_of(masks, keeps, simplify)
    check_centred(masks, keeps, states)
    _check_known(masks, states)
    trained = masks.need_gradients and finite_fill != "minus_inf"
    reading = _Reading(masks, keeps, predicate, simplify, states, trained)
    if all(state.score == -math.inf for state in states):
        return Outcome(reading.without_any())
    policy = reading.mean(is_linear)
    if policy is not None and not site.dropout:
        return Outcome(policy)
    return reading.levels()


def _kinds(keep: Keep, dtype: torch.dtype) -> list[tuple[float, str]]:
    """How the numbers act by which an operand hides."""
    raw = [float(value) for _, value in keep.hidden]
    before = raw if len(raw) == len(keep.fills) else keep.fills
    pairs = zip(keep.fills, before, strict=True)
    return [(fill, kind_of(fill, number, dtype)) for fill, number in pairs]


def _check_known(masks: SiteMasks, states: Sequence[State]) -> None:
    """That the scores of all hidden pairs are known."""
    if masks.site.causal and not all(state.score == -math.inf for state in states):
        raise _DIFFERENT  # SDPA's is_causal masks with -inf.
    if all(state.score is not None for state in states):
        return
    if masks.dtype == torch.float16:
        raise Refused(
            "it adds finfo.min to float16 scores, which leaves fully masked rows a softmax over "
            "their scores, and rows may be fully masked",
            'mask with float("-inf") or by masked_fill, use bfloat16, or set '
            'options={"finite_fill": "minus_inf"}',
        )
    raise _DIFFERENT


@dataclass(frozen=True)
class _Reading:
    """How pairs are hidden; arguments as above, and whether scores get gradients."""

    masks: SiteMasks
    keeps: Sequence[Keep]
    predicate: sympy.Basic
    simplify: Simplifier
    states: tuple[State, ...]
    trained: bool

    def mean(self, is_linear: bool) -> EmptyRows | None:
        """The policy of rows that are the mean of all values, where an executor knows it."""
        if len({state.score for state in self.states}) > 1:
            return None
        if is_linear and all(min(state.shares) == 1.0 for state in self.states):
            return EmptyRows.MEAN_ADDED
        still = all(self._value(state) == 0 for state in self.states)
        return EmptyRows.MEAN if still else None

    def without_any(self) -> EmptyRows:
        """What rows yield whose scores all are -inf."""
        site = self.masks.site
        moved = {state.shares[0] > 0 for state in self.states if state.score == -math.inf}
        if site.kind == "sdpa" or site.zeroed:
            if site.zeroed == "nan" and True in moved and self.masks.need_gradients:
                raise Refused(
                    "rows may be fully masked by adding -inf: their gradient is NaN, though "
                    "weights are 0",
                    "use masked_fill or torch.where with float('-inf')",
                )
            return EmptyRows.ZERO
        if len(moved) > 1 and self.masks.need_gradients:
            raise _DIFFERENT
        return EmptyRows.NAN_ADDED if moved == {True} else EmptyRows.NAN

    def levels(self) -> Outcome:
        """What rows attend to that see no key, score by score."""
        scores = sorted({state.score for state in self.states if state.score is not None})
        found: list[Level] = []
        for score in reversed([score for score in scores if score > -math.inf]):
            here = tuple(state for state in self.states if state.score == score)
            below = [s.condition for s in self.states if s.score is not None and s.score < score]
            found.append(Level(here, self._shortest(here, below), tuple(self._values(here))))
        anything = sympy.Or(self.predicate, *(level.condition for level in found))
        # The lowest level is all that is left, unless there is -inf below.
        complete = scores[0] > -math.inf
        if complete or never_empty(anything, self.masks.lengths, self.simplify):
            return Outcome(EmptyRows.ZERO, tuple(found))
        return Outcome(self.without_any(), tuple(found))

    def _shortest(self, here: Iterable[State], below: Sequence[sympy.Basic]) -> sympy.Basic:
        """Which pairs are of some states, of those of a query that has none of higher scores."""
        own = sympy.Or(*(state.condition for state in here))
        ways = own, sympy.Or(self.predicate, own), sympy.Not(sympy.Or(*below))
        return min(map(self.simplify, ways), key=sympy.count_ops)

    def _values(self, states: Sequence[State]) -> Iterable[tuple[sympy.Expr, sympy.Basic]]:
        """The values of some states; what fits none before is of the last."""
        groups: dict[sympy.Expr, list[State]] = {}
        for state in states:
            groups.setdefault(self._value(state), []).append(state)
        left = list(states)
        for value, group in list(groups.items())[:-1]:
            left = [state for state in left if state not in group]
            yield value, self._told_apart(group, left)
        yield list(groups)[-1], sympy.true

    def _told_apart(self, group: Sequence[State], others: Sequence[State]) -> sympy.Basic:
        """What holds for some states, and not for others."""
        for at, keep in enumerate(self.keeps):
            mine, theirs = ({state.fills[at] for state in some} for some in (group, others))
            if mine == {None} and None not in theirs:
                return keep.condition
            if theirs == {None} and None not in mine:
                return self.simplify(sympy.Not(keep.condition))
        return self.simplify(sympy.Or(*(state.condition for state in group)))

    def _value(self, state: State) -> sympy.Expr:
        """What the gradient of a hidden score follows: of what reaches it, as much as does.

        What comes after a mask is linear: a curve would make masked scores finite.
        """
        site = self.masks.site
        whole = SCORE if site.score is None else site.score.value
        if not self.trained:
            return sympy.S.Zero
        if min(state.shares) == 1.0:
            return whole
        later = {learned(i)(): sympy.Dummy() for i in range(state.first + 1, len(site.masks))}
        named = whole.xreplace(later)
        terms = [number(state.shares[0]) * named.xreplace(dict.fromkeys(later.values(), 0))]
        for (mark, name), operand, share in zip(
            later.items(),
            site.masks[state.first + 1 :],
            state.shares[state.first + 2 :],
            strict=True,
        ):
            if is_trained(operand):
                terms.append(number(share) * sympy.diff(named, name) * mark)
        return sympy.Add(*terms)


def _check_finite(fills: Mapping[float, str], finite_fill: str) -> bool:
    """Refuse fills that are a bias; whether some are taken for -inf because the user said so."""
    biases = [fill for fill, kind in fills.items() if kind == "finite"]
    if not biases:
        return finite_fill == "minus_inf" and "half" in fills.values()
    if finite_fill == "minus_inf" and max(biases) <= LARGEST_ASSUMED:
        return True
    hint = _FINITE_HINT if max(biases) <= LARGEST_ASSUMED else "mask with float('-inf')"
    raise Refused(f"it masks with the finite score {max(biases):g}, which is a bias", hint)

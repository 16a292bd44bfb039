"""What a fully masked query yields in the original program, and whether there can be one.

Softmax over a row of -inf is NaN, and SDPA makes that 0. Over a row of finfo.min it is uniform: the
mean of V. Other finite fills leave masked keys a weight that depends on the scores: a bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy

from sparse_compile.expr import KV, Q
from sparse_compile.passes.lift.masks import Keep, SiteMasks, fill_kind
from sparse_compile.passes.lift.simplify import Simplifier
from sparse_compile.sites.site import Refused
from sparse_compile.spec import EmptyRows

#: With ``finite_fill="minus_inf"``, fills up to this one count as minus infinity.
LARGEST_ASSUMED = -1e4
_FINITE_HINT = (
    'options={"finite_fill": "minus_inf"} reads fills <= -1e4 as float("-inf"), which differs from '
    "the program only where a whole row is masked"
)


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


def empty_row_policy(
    masks: SiteMasks,
    keeps: Sequence[Keep],
    predicate: sympy.Basic,
    simplify: Simplifier,
    finite_fill: str,
    is_linear: bool,
) -> EmptyRows:
    """What the program yields on fully masked rows.

    Args:
        masks: of an attention.
        keeps: what the mask operands do.
        predicate: what they say together.
        simplify: in the ranges of the coordinates.
        finite_fill: the option of that name.
        is_linear: whether scores are the scaled products and what has no gradient.

    Raises:
        Refused: when masked keys would still have weight, or no policy describes the program.
    """
    site = masks.site
    if site.kind == "call":
        return EmptyRows.ZERO
    fills = {fill: fill_kind(fill, masks.dtype) for keep in keeps for fill in keep.fills}
    assumed = _check_finite(fills, finite_fill)
    # With a sink, a row without keys gives all its weight to that, and yields 0.
    if assumed or site.sinks is not None or never_empty(predicate, masks.lengths, simplify):
        return EmptyRows.ZERO
    masking = [keep for keep in keeps if keep.fills]
    policy = _of_empty_rows(masks, masking, fills)
    if site.zeroed:
        policy = _zeroed(masks, policy)
    tied = any(keep.tied for keep in masking)
    if policy is not EmptyRows.MEAN_ADDED or (is_linear and not tied):
        return policy
    # On such a row scores that are not linear in q·k are still there, and autograd sends gradients
    # through them: O(n) of work for linear ones only. With "minus_inf" masked scores get none.
    trained = masks.need_gradients and finite_fill != "minus_inf"
    if not trained:
        return EmptyRows.MEAN
    return EmptyRows.HALVED if tied else EmptyRows.ATTENDED


def _zeroed(masks: SiteMasks, policy: EmptyRows) -> EmptyRows:
    """The policy where weights are made 0 after the softmax."""
    if policy is EmptyRows.NAN_ADDED and masks.need_gradients and masks.site.zeroed != "empty":
        raise Refused(
            "rows may be fully masked by adding -inf: their gradient is NaN, though weights are 0",
            "use masked_fill or torch.where with float('-inf')",
        )
    is_nan = policy in (EmptyRows.NAN, EmptyRows.NAN_ADDED)
    return EmptyRows.ZERO if is_nan or masks.site.zeroed == "hidden" else policy


def _of_empty_rows(
    masks: SiteMasks, keeps: Sequence[Keep], fills: Mapping[float, str]
) -> EmptyRows:
    site = masks.site
    # SDPA's is_causal masks with -inf.
    kinds = set(fills.values()) | ({"inf"} if site.causal else set())
    if len(keeps) > 1 and all(keep.adds and keep.condition == keeps[0].condition for keep in keeps):
        # One mask, added several times.
        total = sum(min(keep.fills) for keep in keeps)
        kinds, keeps = {fill_kind(total, masks.dtype)}, keeps[:1]
    if "half" in kinds:
        raise Refused(
            "it masks float16 scores with finfo.min, which leaves fully masked rows a softmax over "
            "their scores, and rows may be fully masked",
            'mask with float("-inf"), use bfloat16, or set options={"finite_fill": "minus_inf"}',
        )
    if kinds == {"inf"} and site.kind == "sdpa":
        return EmptyRows.ZERO
    if kinds == {"inf"} and len({keep.adds for keep in keeps}) == 1:
        return EmptyRows.NAN_ADDED if keeps[0].adds else EmptyRows.NAN
    if kinds == {"absorbing"} and len(keeps) == 1 and len(fills) == 1:
        return EmptyRows.MEAN_ADDED if keeps[0].adds else EmptyRows.MEAN
    if kinds == {"absorbing"} and len(fills) == 1 and not any(keep.adds for keep in keeps):
        return EmptyRows.MEAN
    raise Refused(
        "it masks several times, in different ways, and rows may be fully masked: what such a row "
        "yields depends on which mask hides which key",
        "combine the masks as bool tensors before turning them into scores",
    )


def _check_finite(fills: Mapping[float, str], finite_fill: str) -> bool:
    """Refuse fills that are a bias; whether some are taken for -inf because the user said so."""
    biases = [fill for fill, kind in fills.items() if kind == "finite"]
    if not biases:
        return finite_fill == "minus_inf" and "half" in fills.values()
    if finite_fill == "minus_inf" and max(biases) <= LARGEST_ASSUMED:
        return True
    hint = _FINITE_HINT if max(biases) <= LARGEST_ASSUMED else "mask with float('-inf')"
    raise Refused(f"it masks with the finite score {max(biases):g}, which is a bias", hint)

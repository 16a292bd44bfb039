"""Attention written out: softmax(scale * q k^T with masks) v."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sparse_compile.passes.find import shapes, values
from sparse_compile.passes.find.canonical import canonical, is_reshape, op_name, where
from sparse_compile.passes.find.chain import READS_NO_VALUES
from sparse_compile.passes.find.contraction import Letters
from sparse_compile.passes.find.dataflow import Dataflow
from sparse_compile.passes.find.operands import (
    MERGED,
    Peeled,
    Reading,
    dead_nodes,
    peel,
    taken_apart,
)
from sparse_compile.passes.find.scores import ScorePath, ScoreWalk, product_above
from sparse_compile.passes.find.sinks import Sunk
from sparse_compile.passes.find.steps import Masked, fold
from sparse_compile.passes.find.weights import (
    Changes,
    WeightsPath,
    forward,
    product_below,
    read_elsewhere,
)
from sparse_compile.sites.operands import MaskOperand, Operand, Scope
from sparse_compile.sites.site import AttentionSite, Refused

#: The softmax that yields 0 where all scores are -inf.
SAFE = "_safe_softmax"
_GRAD_MODES = ("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")
#: What keeps the best of the scores, by index or by a threshold.
_RANKS = frozenset("topk ge gt le lt greater_equal greater less_equal less".split())
_SCORE_AXES = {4: ("b", "h", "q", "kv"), 3: ("b", "q", "kv"), 2: ("q", "kv")}


def match_eager(softmax: Node, flow: Dataflow, scope: Scope) -> AttentionSite | None:
    """The attention around a softmax, or None if it is no attention.

    Raises:
        Refused: it cannot be taken.
    """
    try:
        return _match(softmax, flow, scope)
    except Refused as refused:
        if product_above(softmax.all_input_nodes[0]) and product_below(softmax):
            raise Refused(refused.reason, refused.hint, _hiding(softmax, flow)) from None
        return None  # A router, a pooling or a classifier.


def _hiding(softmax: Node, flow: Dataflow) -> tuple[MaskOperand, ...]:
    """What hides the scores that a softmax reads, if that is known."""
    call = canonical(softmax)
    assert call is not None
    try:
        steps = ScoreWalk(flow).back(call.args["input"], softmax).steps
    except Refused:
        return ()
    return tuple(step.mask for step in steps if isinstance(step, Masked))


def _match(softmax: Node, flow: Dataflow, scope: Scope) -> AttentionSite:
    call = canonical(softmax)
    assert call is not None
    scores = ScoreWalk(flow).back(call.args["input"], softmax)
    sunk = scores.sunk
    _check_axis(softmax, call.args["dim"])
    weights = forward(softmax, sunk)
    sides = _Sides(scores, weights)
    output, tail = sides.output()
    region = {*scores.nodes, *weights.nodes, *tail}
    ranked = _check_closed(region, output.node, flow)
    _check_grad_mode(region, output.node, flow)
    q, k, v = _operands(sides, output.node, flow)
    shapes.check_query(q.operand, sides.score_shape, sides.score_axes)
    shapes.check_operands(q.operand, k.operand, v.operand)
    shapes.check_output_dtype(output)
    shapes.head_dim(q.operand)  # Before the scale, which is often its root.
    scale, masks, program = fold(scores.steps, flow, sides.axes_at, sunk is not None)
    shapes.check_masks(masks, sides.score_shape)
    if sunk:
        _check_sinks(sunk, sides, output.node, flow)
    numbers = (scale, *(mask.fill for mask in masks))
    _check_numbers(numbers, scores.product.node, output.node, flow)
    site = AttentionSite(
        scope,
        output,
        q.operand,
        k.operand,
        v.operand,
        scale,
        "eager",
        masks=masks,
        score_axes=sides.score_axes,
        where=where(softmax),
        region=dead_nodes(region, (q, k, v)),
        ranked=ranked,
        score=program,
        sinks=sunk.sinks if sunk else None,
        dropout=weights.changes.dropout,
        zeroed=_zeroed(weights.changes, masks) or "empty" * (op_name(softmax) == SAFE),
    )
    if ranked and (sunk or site.plain_score):
        raise Refused(*ranked)
    return site


def _zeroed(changes: Changes, masks: tuple[MaskOperand, ...]) -> str:
    """Which weights are made 0, as in :class:`AttentionSite`.

    Raises:
        Refused: weights are made 0 that the scores have not hidden.
    """
    hidden = [mask.node for mask in masks if mask.role == "drop"]
    if any(mask not in hidden for mask in changes.masks) or (changes.masks and len(masks) > 1):
        raise Refused(
            "`masked_fill` changes the attention weights after the softmax",
            "mask the scores before the softmax instead",
        )
    return "hidden" if changes.masks else "nan" * changes.zeroed


def _check_sinks(sunk: Sunk, sides: _Sides, output: Node, flow: Dataflow) -> None:
    if sides.split is not None or len(values.shape(sunk.join)) != len(sides.score_axes):
        raise Refused(
            "attention sinks are columns of scores of merged batches and heads",
            "keep the scores [B, H, N, N]",
        )
    if not flow.stays(sunk.sinks, sunk.join, output):
        raise Refused(f"`{sunk.sinks.name}` is changed in place", "change it before the attention")


class _Sides:
    """The axes of both products and of the scores between them."""

    def __init__(self, scores: ScorePath, weights: WeightsPath) -> None:
        self.scores, self.weights = scores, weights
        masked = [step.shape for step in scores.steps if isinstance(step, Masked)]
        products = [scores.shapes[0], weights.shapes[-1]]
        ranks = {len(shape) for shape in (*products, *masked)}
        four = [s for s in (*scores.shapes, *weights.shapes) if len(s) == 4]
        if {3, 4} <= ranks and not all(values.same_shape(shape, four[0]) for shape in four):
            raise Refused("the scores are split in two different ways", "keep them [B, H, N, N]")
        #: Batch and heads, where the products have them in one.
        self.split: tuple[Any, Any] | None = four[0][:2] if {3, 4} <= ranks else None
        if self.split is None and len(products[0]) != len(products[1]):
            raise Refused("the scores are reshaped before the softmax", "keep them [B, H, N, N]")
        self.score_shape = four[0] if self.split else products[0]
        self.score_axes = self._axes_of_scores()

    def _axes_of_scores(self) -> tuple[str, ...]:
        rank = len(self.score_shape)
        return (*self._names, "q", "kv") if rank == 5 else _SCORE_AXES[rank]

    @property
    def _names(self) -> tuple[str, ...]:
        """What three axes before queries and keys are: heads in groups, or batches of batches."""
        product = self.scores.product
        *lead, _, key = product.out
        k = product.right if key in product.right.axes else product.left
        sizes = dict(zip(k.axes, values.shape(k.node), strict=True))
        shared = not values.same(sizes.get(lead[-1], 1), self.score_shape[2])
        return ("b", "h1", "h2") if shared else ("b1", "b2", "h")

    def axes_at(self, shape: tuple[Any, ...]) -> tuple[str, ...]:
        """The axes of scores of a shape that they take on their way.

        Raises:
            Refused: they are taken apart in a way that is not known.
        """
        whole = self.score_shape
        if len(shape) == len(whole):
            return self.score_axes
        if len(shape) == 3 and self.split:
            return ("bh", "q", "kv")
        if len(shape) == 5 and len(whole) == 4:
            if values.same(shape[0] * shape[1], whole[0]) and values.same(shape[2], whole[1]):
                return ("b1", "b2", "h", "q", "kv")
            if values.same(shape[1] * shape[2], whole[1]) and values.same(shape[0], whole[0]):
                return ("b", "h1", "h2", "q", "kv")
        raise Refused("the scores are reshaped before the softmax", "keep them [B, H, N, N]")

    def _lead(self, letters: Letters) -> dict[str, str]:
        batch = letters[:-2]
        if self.split and len(batch) == 1:
            return {batch[0]: MERGED}
        names = self._names if len(batch) == 3 else ("b", "h")
        return dict(zip(batch, names, strict=False))

    def q_and_k(self) -> tuple[Operand, Operand]:
        product = self.scores.product
        *_, query, key = product.out
        (summed,) = product.summed
        axes = {**self._lead(product.out), query: "n", key: "n", summed: "d"}
        left, right = product.left.renamed(axes), product.right.renamed(axes)
        return (left, right) if query in product.left.axes else (right, left)

    def v(self) -> Operand:
        return self.weights.v.renamed(self._value_axes())

    def output(self) -> tuple[Operand, tuple[Node, ...]]:
        """The output, and the nodes it adds to the region."""
        axes, product = self._value_axes(), self.weights.product
        letters = tuple(axes[letter] for letter in product.out)
        if MERGED not in letters:
            return Operand(product.node, letters), ()
        readers = list(product.node.users)
        assert self.split is not None
        if len(readers) == 1 and is_reshape(readers[0]):
            apart = taken_apart(letters, product.node, readers[0], self.split)
            if apart is not None:
                return Operand(readers[0], apart), (readers[0],)
        raise Refused(
            "the mask is applied to [B, H, N, N] scores but the output merges batch and heads",
            "keep q, k and v four-dimensional",
        )

    def _value_axes(self) -> dict[str, str]:
        *_, query, key = self.weights.weights
        axes = {**self._lead(self.weights.weights), query: "n", key: "n"}
        return {**dict.fromkeys(self.weights.v.axes, "d"), **axes}


def _operands(sides: _Sides, output: Node, flow: Dataflow) -> tuple[Peeled, Peeled, Peeled]:
    q, k = sides.q_and_k()
    scores, weighted = sides.scores.product.node, sides.weights.product.node
    # What casts are undone to, if the scores were computed in a dtype that the output cannot hold.
    dtype = None if values.widens(scores, output) else values.dtype(output)
    found = []
    for heads in (True, False):
        at_scores = Reading(flow, scores, output, sides.split, dtype, heads)
        at_output = Reading(flow, weighted, output, sides.split, None, heads)
        found = [peel(k, at_scores), peel(sides.v(), at_output)]
        if shapes.heads_agree(found[0].operand, found[1].operand):
            break
    query = peel(q, Reading(flow, scores, output, sides.split, dtype, heads=False))
    for peeled in (query, found[0]):
        _check_precision(peeled.operand, dtype)
    return query, found[0], found[1]


def _check_precision(operand: Operand, dtype: torch.dtype | None) -> None:
    own = values.dtype(operand.node)
    if dtype is not None and own is not None and own != dtype:
        have, want = values.short_dtype(own), values.short_dtype(dtype)
        raise Refused(
            f"the scores are computed from {have} operands but the output is {want}",
            f"cast q and k to {want} before the attention",
        )


def _check_axis(softmax: Node, dim: object) -> None:
    rank = len(values.shape(softmax))
    if not isinstance(dim, int):
        raise Refused("the softmax does not say over which axis it runs", "write dim=-1")
    if dim % rank != rank - 1:
        axis = {rank - 2: "the queries", rank - 3: "the heads"}.get(dim % rank, f"axis {dim}")
        raise Refused(f"the softmax runs over {axis}, not over the keys", "write dim=-1")


def _check_closed(region: set[Node], output: Node, flow: Dataflow) -> tuple[str, str] | None:
    """Why the scores must exist, and what helps, if only a ranking reads them besides.

    Raises:
        Refused: something else does.
    """
    ranked = None
    for node in sorted(region - {output}):
        readers = [reader for reader in node.users if reader not in region]
        readers = [reader for reader in readers if op_name(reader) not in READS_NO_VALUES]
        if readers:
            refusal = read_elsewhere("scores", readers, node)
            if not all(op_name(reader) in _RANKS for reader in readers):
                raise refusal
            ranked = ranked or (refusal.reason, refusal.hint)
    return ranked


def _check_grad_mode(region: set[Node], output: Node, flow: Dataflow) -> None:
    first = min(region)
    for node in flow.position:
        if first < node < output and op_name(node) in _GRAD_MODES:
            raise Refused(
                "gradients are switched on or off between the scores and the output",
                "put the whole attention inside or outside of torch.no_grad()",
            )


def _check_numbers(
    numbers: tuple[float | Node, ...], product: Node, output: Node, flow: Dataflow
) -> None:
    for number in numbers:
        if isinstance(number, Node) and not flow.stays(number, product, output):
            raise Refused(f"`{number.name}` is changed in place", "make it a Python number")

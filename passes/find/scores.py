"""From the softmax back to the product of q and k: the scale and the masks on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from sparse_compile.passes.find import values
from sparse_compile.passes.find.canonical import Call, canonical, is_reshape, op_name, source
from sparse_compile.passes.find.contraction import Contraction, contraction
from sparse_compile.passes.find.dataflow import Dataflow, breadth_first, constant
from sparse_compile.passes.find.sinks import Sunk, own_maximum, unexpanded
from sparse_compile.passes.find.steps import (
    CURVES,
    Curve,
    Factor,
    Floored,
    Masked,
    Narrowed,
    OwnMaximum,
    Shift,
    Step,
)
from sparse_compile.sites.operands import MaskOperand
from sparse_compile.sites.site import Refused

_LONGEST_SEARCH = 200
"""Nodes visited per softmax: sums are searched on both sides."""


@dataclass(frozen=True)
class ScorePath:
    """What happens to the scores between the product and the softmax.

    Attributes:
        product: q times k.
        steps: in the order in which the program applies them.
        nodes: the product and all nodes on the way, in-place updates included.
        shapes: the shapes that the scores take, the product's first.
        sunk: the columns that are beside them in the end, if there are any.
    """

    product: Contraction
    steps: tuple[Step, ...]
    nodes: tuple[Node, ...]
    shapes: tuple[tuple[Any, ...], ...]
    sunk: Sunk | None = None

    def then(self, node: Node, *steps: Step) -> ScorePath:
        """The path one node further on."""
        if self.sunk is not None and steps:
            raise _unknown(self.sunk.join)
        return replace(
            self,
            steps=(*self.steps, *steps),
            nodes=(*self.nodes, node),
            shapes=self.shapes if self.sunk else (*self.shapes, values.shape(node)),
        )


class ScoreWalk:
    """Walks back from a softmax. One object per softmax: it counts the nodes it visits."""

    def __init__(self, flow: Dataflow) -> None:
        """Walk in the graph of ``flow``."""
        self.flow = flow
        self._fuel = _LONGEST_SEARCH

    def back(self, node: Node, reader: Node) -> ScorePath:
        """The path from the product to ``node`` as ``reader`` sees it.

        Raises:
            Refused: there is no product, or something on the way is not understood.
        """
        self._fuel -= 1
        if self._fuel < 0:
            raise Refused("the scores are a sum of too many terms")
        node = self.flow.current(node, reader)
        if not values.is_float(node):
            raise Refused("the scores are not floating point")
        product = contraction(node)
        if product is not None:
            return self._product(product)
        if is_reshape(node):
            return self._reshape(node)
        call = canonical(node)
        handler = None if call is None else _HANDLERS.get(call.op)
        if call is None or handler is None:
            raise _unknown(node)
        path = handler(self, node, call)
        if not path.sunk and not values.same_shape(path.shapes[-1], path.shapes[-2]):
            raise Refused(
                f"`{op_name(node)}` broadcasts the scores to a larger shape",
                "give q the batch size and heads of the mask",
            )
        return path

    def _product(self, product: Contraction) -> ScorePath:
        call = canonical(product.node)
        assert call is not None
        check_product(product)
        path = ScorePath(product, (), (product.node,), (values.shape(product.node),))
        if call.op != "baddbmm":
            return path
        # beta == 0 ignores the input, even if it is uninitialised.
        steps: list[Step] = [Factor(call.args["alpha"])]
        beta = values.number(call.args["beta"])
        if beta is None:
            raise Refused("baddbmm adds its input times a number known only at run time")
        if beta != 0.0:
            steps.append(_added(product.node, call.args["input"], beta))
        return replace(path, steps=tuple(steps))

    def _reshape(self, node: Node) -> ScorePath:
        start = source(node)
        assert start is not None
        before, after = values.shape(start), values.shape(node)
        if len(before) < 2 or not values.same_shape(before[-2:], after[-2:]):
            raise Refused("the scores are reshaped before the softmax", "keep them [B, H, N, N]")
        return self.back(start, node).then(node)

    def _cast(self, node: Node, call: Call) -> ScorePath:
        start, dtype = call.args["input"], values.dtype(node)
        if dtype is None or not values.same_device(start, node):
            raise _unknown(node)
        return self._pass(node, call, *([] if values.widens(start, node) else [Narrowed(dtype)]))

    def _pass(self, node: Node, call: Call, *steps: Step) -> ScorePath:
        return self.back(call.args["input"], node).then(node, *steps)

    def _dropout(self, node: Node, call: Call) -> ScorePath:
        if dropout_of(call):
            raise Refused("scores are dropped before the softmax", "drop weights after it")
        return self._pass(node, call)

    def _curve(self, node: Node, call: Call) -> ScorePath:
        return self._pass(node, call, Curve(call.op, CURVES[call.op]))

    def _neg(self, node: Node, call: Call) -> ScorePath:
        return self._pass(node, call, Factor(-1.0))

    def _mul(self, node: Node, call: Call) -> ScorePath:
        left, right = call.args["input"], call.args["other"]
        if values.is_scalar(right) and not _is_trained(right):
            return self._pass(node, call, Factor(right))
        if values.is_scalar(left) and not call.in_place and not _is_trained(left):
            return self.back(right, node).then(node, Factor(left))
        if not isinstance(left, Node) or not isinstance(right, Node):
            raise _unknown(node)
        path, other = self._either(left, right, node)
        if call.in_place and other is left:
            raise Refused("the scores are multiplied into another tensor in place")
        return path.then(node, _factor(node, other))

    def _div(self, node: Node, call: Call) -> ScorePath:
        other = call.args["other"]
        if call.args["rounding_mode"] is not None:
            raise Refused("the scores are rounded to whole numbers")
        if values.is_scalar(other) and not _is_trained(other) and not _is_tensor(other, self.flow):
            return self._pass(node, call, Factor(other, inverse=True))
        return self._pass(node, call, _factor(node, other, inverse=True))

    def _add(self, node: Node, call: Call) -> ScorePath:
        left, right = call.args["input"], call.args["other"]
        times = values.number(call.args["alpha"])
        for scores, other, beside in ((left, right, times), (right, left, None)):
            known = constant(other, self.flow)
            if isinstance(scores, Node) and not values.is_scalar(scores) and known is not None:
                if times is None or (call.in_place and scores is right):
                    break
                if beside is None and times != 1.0:
                    break  # it is the scores that are multiplied
                shift = [Shift(known * times)] if known != 0.0 else []
                return self.back(scores, node).then(node, *shift)
        if values.tensor(left) is None or values.tensor(right) is None:
            raise Refused(
                "a number known only at run time is added to the scores",
                "leave it out: softmax ignores it",
            )
        path, other = self._either(left, right, node)
        if call.in_place and other is left:
            raise Refused("the scores are added to the mask in place", "add the mask to the scores")
        if times != 1.0 and (times is None or other is left):
            raise Refused("torch.add with alpha is used on the scores", "multiply the mask first")
        return path.then(node, _added(node, other, times))

    def _either(
        self, left: Node, right: Node, node: Node, first: bool = False
    ) -> tuple[ScorePath, Node]:
        """The path to one of two tensors, and the other; with ``first``, left where it is both."""
        paths, refusals = [], []
        for side, other in ((left, right), (right, left)):
            try:
                paths.append((self.back(side, node), other))
            except Refused as refusal:
                refusals.append((side, refusal))
        if len(paths) == 2 and not first:
            raise Refused(
                "the scores are the sum of two products",
                "concatenate the features of both products instead",
            )
        if paths:
            return paths[0]
        raise next((refusal for side, refusal in refusals if product_above(side)), refusals[0][1])

    def _sub(self, node: Node, call: Call) -> ScorePath:
        start, other = call.args["input"], call.args["other"]
        times, known = values.number(call.args["alpha"]), constant(other, self.flow)
        if not isinstance(start, Node) or values.is_scalar(start) or times is None:
            raise _unknown(node)
        path = self.back(start, node)
        shift = own_maximum(call)
        if shift:
            # The columns beside the scores are part of the maximum.
            steps = () if path.sunk else (OwnMaximum(),)
            return replace(path.then(node, *steps), nodes=(*path.nodes, node, *shift))
        if path.sunk is not None:
            raise _unknown(path.sunk.join)
        if known is not None:
            return path.then(node, Shift(-known * times))
        if not isinstance(other, Node) or product_above(other, hops=1):
            raise _unknown(node)
        return path.then(node, _added(node, other, -times))

    def _maximum(self, node: Node, call: Call) -> ScorePath:
        """Scores that are no less than the least finite number: -inf becomes that."""
        for scores, other in ((call.args["input"], call.args["other"]),) * 2:
            known, dtype = constant(other, self.flow), values.dtype(node)
            if known is not None and dtype is not None and isinstance(scores, Node):
                if known > torch.finfo(dtype).min:
                    break
                shares = "cl" not in op_name(node)  # clamp, clip
                return self.back(scores, node).then(node, Floored(known, shares))
        raise _unknown(node)

    def _cat(self, node: Node, call: Call) -> ScorePath:
        """Scores with attention sinks beside them."""
        parts, rank = call.args["tensors"], len(values.shape(node))
        if call.args["dim"] not in (-1, rank - 1) or len(parts) != 2:
            raise Refused(
                "the scores are put together from several tensors", "compute them at once"
            )
        path, beside = self._either(parts[0], parts[1], node, first=True)
        if not isinstance(values.shape(beside)[-1], int):
            raise Refused("the number of columns beside the scores is known only at run time")
        sinks = unexpanded(self.flow.current(beside, node), self.flow)
        sunk = Sunk(sinks, node, beside is parts[0], path.shapes[-1][-1])
        return replace(path, nodes=(*path.nodes, node), sunk=sunk)

    def _masked_fill(self, node: Node, call: Call) -> ScorePath:
        path = self.back(call.args["input"], node)
        return self._masked(path, node, call.args["mask"], "drop", call.args["value"])

    def _where(self, node: Node, call: Call) -> ScorePath:
        for name, other, role in (("input", "other", "keep"), ("other", "input", "drop")):
            scores, fill = call.args[name], call.args[other]
            is_fill = values.is_scalar(fill) or constant(fill, self.flow) is not None
            if isinstance(scores, Node) and not values.is_scalar(scores) and is_fill:
                path = self.back(scores, node)
                return self._masked(path, node, call.args["condition"], role, fill)
        raise Refused(
            "torch.where chooses between the scores and another tensor",
            "write the masked value as a number",
        )

    def _masked(self, path: ScorePath, node: Node, mask: Any, role: str, fill: Any) -> ScorePath:
        if values.dtype(mask) is not torch.bool:
            raise Refused("the mask is not a bool tensor", "compare it first: mask != 0")
        known = constant(fill, self.flow)
        operand = MaskOperand(mask, role, fill if known is None else known)
        if isinstance(fill, Node) and not values.is_scalar(fill):
            # full_like(scores, ...) reads the scores, though only their shape.
            path = replace(path, nodes=(*path.nodes, fill))
        return path.then(node, Masked(operand, values.shape(node)))


_HANDLERS: dict[str, Callable[[ScoreWalk, Node, Call], ScorePath]] = {
    "cast": ScoreWalk._cast,
    "cat": ScoreWalk._cat,
    "copy": ScoreWalk._pass,
    "dropout": ScoreWalk._dropout,
    "mul": ScoreWalk._mul,
    "div": ScoreWalk._div,
    "neg": ScoreWalk._neg,
    "add": ScoreWalk._add,
    "sub": ScoreWalk._sub,
    "maximum": ScoreWalk._maximum,
    **dict.fromkeys(CURVES, ScoreWalk._curve),
    "masked_fill": ScoreWalk._masked_fill,
    "where": ScoreWalk._where,
}


def check_product(product: Contraction) -> None:
    """That the product is scores: q gives the second last axis, k the last, one axis is summed.

    Raises:
        Refused: it is not.
    """
    out, left, right = product.out, product.left.axes, product.right.axes
    if not 2 <= len(out) <= 5:
        raise Refused(f"the scores have {len(out)} axes", "give q, k and v the shape [B, H, N, D]")
    query, key = out[-2:]
    crossed = (query in left) != (query in right) and (key in left) != (key in right)
    if not crossed or (query in left) == (key in left):
        raise Refused(
            "heads are mixed between the scores and the softmax (talking heads)",
            "this attention has no sparse form and is left as it is",
        )
    (*_, summed) = product.summed or ("",)
    if len(product.summed) != 1 or summed not in left or summed not in right:
        raise Refused("the scores do not sum over exactly one axis that q and k share")


def dropout_of(call: Call) -> float:
    """The probability with which a call of dropout drops.

    Raises:
        Refused: it is known only at run time.
    """
    return 0.0 if call.args["training"] is False else probability(call.args["p"], "p")


def probability(given: object, name: str) -> float:
    """A probability of dropout.

    Raises:
        Refused: it is known only at run time.
    """
    known = values.number(given)
    if known is None:
        raise Refused(
            f"dropout on the attention weights has a run-time probability ({name})",
            "make it a Python number",
        )
    return known


def _is_trained(value: object) -> bool:
    example = values.tensor(value)
    return example is not None and example.requires_grad


def _is_tensor(value: object, flow: Dataflow) -> bool:
    """Whether an argument is a tensor whose number is known at run time only."""
    return values.tensor(value) is not None and constant(value, flow) is None


def _factor(node: Node, other: Any, inverse: bool = False) -> Masked:
    if not values.is_float(other):
        raise Refused("the scores are multiplied by something that is no floating tensor")
    return Masked(MaskOperand(other, "factor"), values.shape(node), inverse=inverse)


def _added(node: Node, mask: Any, times: float = 1.0) -> Masked:
    dtype = values.dtype(mask)
    if dtype is None:
        raise Refused("something that is not a tensor is added to the scores")
    if dtype is torch.bool:
        raise Refused(
            "a bool mask is added to the scores: that adds 0 or 1 and masks nothing",
            "use masked_fill(~mask, -inf), or SDPA's attn_mask",
        )
    return Masked(MaskOperand(mask, "add"), values.shape(node), times)


_UNKNOWN = {
    "cat": "the scores are joined with other columns in a way that is not known as attention sinks",
    "linear": "heads are mixed between the scores and the softmax (talking heads)",
    "conv2d": "the scores are convolved before the softmax",
    "sub": "something is subtracted from the scores before the softmax",
    "topk": "the largest scores are selected",
    "scatter": "the scores are selected by scatter",
}
_HINTS = {"sub": "add the negative mask, and leave out a subtracted maximum: softmax ignores it"}


def _unknown(node: Node) -> Refused:
    name = op_name(node).strip("_")
    reason = _UNKNOWN.get(name, f"`{name}` changes the scores before the softmax")
    return Refused(reason, _HINTS.get(name, ""))


def product_above(node: Node, hops: int = 10) -> bool:
    """Whether a product of two tensors stands a few nodes above, whatever is in between."""
    above = breadth_first(node, lambda n: filter(_may_be_scores, n.all_input_nodes), hops)
    return any(contraction(n) is not None for n in above)


def _may_be_scores(node: Node) -> bool:
    return values.tensor(node) is None or values.is_float(node)

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
from sparse_compile.passes.find.steps import Factor, Masked, Narrowed, Step, Tanh
from sparse_compile.sites.site import MaskOperand, Refused

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
        if beta == 1.0:
            steps.append(_added(product.node, call.args["input"]))
        elif beta != 0.0:
            raise Refused(f"baddbmm adds its input times beta={call.args['beta']}", "use beta=1")
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
        check_no_dropout(call)
        return self._pass(node, call)

    def _tanh(self, node: Node, call: Call) -> ScorePath:
        return self._pass(node, call, Tanh())

    def _mul(self, node: Node, call: Call) -> ScorePath:
        left, right = call.args["input"], call.args["other"]
        if values.is_scalar(right):
            return self._pass(node, call, Factor(right))
        if values.is_scalar(left) and not call.in_place:
            return self.back(right, node).then(node, Factor(left))
        raise Refused(
            "the scores are multiplied by a tensor with more than one element",
            "multiply q by it instead",
        )

    def _div(self, node: Node, call: Call) -> ScorePath:
        if call.args["rounding_mode"] is not None or not values.is_scalar(call.args["other"]):
            raise Refused(
                "the scores are divided by something that is not a number",
                "divide q by it instead",
            )
        return self._pass(node, call, Factor(call.args["other"], inverse=True))

    def _add(self, node: Node, call: Call) -> ScorePath:
        left, right = call.args["input"], call.args["other"]
        if values.number(right) == 0.0:
            return self._pass(node, call)
        if values.number(left) == 0.0 and not call.in_place:
            return self.back(right, node).then(node)
        if values.tensor(left) is None or values.tensor(right) is None:
            raise Refused("a number is added to the scores", "leave it out: softmax ignores it")
        if values.number(call.args["alpha"]) != 1.0:
            raise Refused("torch.add with alpha is used on the scores", "multiply the mask first")
        path, other = self._either(left, right, node)
        if call.in_place and other is left:
            raise Refused("the scores are added to the mask in place", "add the mask to the scores")
        return path.then(node, _added(node, other))

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
        start = call.args["input"]
        path = self.back(start, node) if isinstance(start, Node) else None
        shift = own_maximum(call)
        if path is None or path.sunk is None:
            raise _unknown(node)  # Unless an earlier reason says more.
        if not shift:
            raise _unknown(path.sunk.join)
        return replace(path.then(node), nodes=(*path.nodes, node, *shift))

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
    "add": ScoreWalk._add,
    "sub": ScoreWalk._sub,
    "tanh": ScoreWalk._tanh,
    "masked_fill": ScoreWalk._masked_fill,
    "where": ScoreWalk._where,
}


def check_product(product: Contraction) -> None:
    """That the product is scores: q gives the second last axis, k the last, one axis is summed.

    Raises:
        Refused: it is not.
    """
    out, left, right = product.out, product.left.axes, product.right.axes
    if not 2 <= len(out) <= 4:
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


def check_no_dropout(call: Call) -> None:
    """That a dropout does nothing.

    Raises:
        Refused: it is active, or may be.
    """
    if call.args["training"] is not False:
        hint = "set the attention dropout to 0, or call model.eval()"
        check_no_probability(call.args["p"], "p", hint)


def check_no_probability(given: object, name: str, hint: str) -> None:
    """That a dropout's probability is 0.

    Raises:
        Refused: it is not, or known only at run time.
    """
    known = values.number(given)
    if known != 0.0:
        shown = "a run-time probability" if known is None else f"{name}={known:g}"
        raise Refused(f"dropout on the attention weights is active ({shown})", hint)


def _added(node: Node, mask: Any) -> Masked:
    dtype = values.dtype(mask)
    if dtype is None:
        raise Refused("something that is not a tensor is added to the scores")
    if dtype is torch.bool:
        raise Refused(
            "a bool mask is added to the scores: that adds 0 or 1 and masks nothing",
            "use masked_fill(~mask, -inf), or SDPA's attn_mask",
        )
    if not dtype.is_floating_point:
        raise Refused(
            f"a tensor of {values.short_dtype(dtype)} is added to the scores",
            "use a bool mask with masked_fill",
        )
    return Masked(MaskOperand(mask, "add"), values.shape(node))


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

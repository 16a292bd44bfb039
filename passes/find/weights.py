"""From the softmax forward to the product with v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from sparse_compile.passes.find import values
from sparse_compile.passes.find.canonical import canonical, is_reshape, op_name, where
from sparse_compile.passes.find.chain import READS_NO_VALUES
from sparse_compile.passes.find.contraction import Contraction, Letters, contraction
from sparse_compile.passes.find.dataflow import breadth_first
from sparse_compile.passes.find.scores import dropout_of
from sparse_compile.passes.find.sinks import Sunk
from sparse_compile.passes.mutation import written_inputs
from sparse_compile.sites.operands import Operand
from sparse_compile.sites.site import Refused


@dataclass(frozen=True)
class WeightsPath:
    """What happens to the weights between the softmax and the product with v.

    Attributes:
        product: weights times v.
        weights: the letters of the weights in it: ..., q, kv.
        v: the other factor, by letters.
        nodes: the softmax, the nodes on the way, the product.
        shapes: the shapes that the weights take.
        changes: what is done to them.
    """

    product: Contraction
    weights: Letters
    v: Operand
    nodes: tuple[Node, ...]
    shapes: tuple[tuple[Any, ...], ...]
    changes: Changes


@dataclass
class Changes:
    """What is done to weights on the way.

    Attributes:
        dropout: the probability with which they are dropped.
        zeroed: whether NaN is made 0.
        masks: those of which the weights are made 0.
    """

    dropout: float = 0.0
    zeroed: bool = False
    masks: tuple[Node, ...] = ()


def forward(softmax: Node, sunk: Sunk | None = None) -> WeightsPath:
    """The path from a softmax to the product with v.

    Args:
        softmax: the softmax.
        sunk: what it reads, where there are columns beside the scores, to be dropped on the way.

    Raises:
        Refused: the weights are read elsewhere, changed, or not multiplied with v.
    """
    node, nodes, wide, changes = softmax, [softmax], 0, Changes()
    while True:
        reader = _only_reader(node)
        if sunk is not None and not wide and sunk.drops(reader, node):
            node, wide = reader, len(nodes)
            nodes.append(node)
            continue
        product = contraction(reader)
        if product is not None:
            if sunk is not None and not wide:
                raise Refused(
                    "columns are added to the scores that are not dropped after the softmax",
                    "drop the columns of attention sinks, as in weights[..., :-1]",
                )
            shapes = tuple(values.shape(n) for n in nodes[wide:])
            return _with_v(product, node, (*nodes, reader), shapes, changes)
        if not _passes(reader, node, changes):
            name = op_name(reader).strip("_")
            raise Refused(
                f"`{name}` changes the attention weights after the softmax",
                _HINTS.get(name, "change the scores before the softmax instead"),
            )
        node = reader
        nodes.append(node)


_HINTS = {
    "masked_fill": "mask the scores before the softmax instead",
    "sub": "differential attention has no sparse form and is left as it is",
}


def _only_reader(node: Node) -> Node:
    readers = [reader for reader in node.users if op_name(reader) not in READS_NO_VALUES]
    overwriting = next((r for r in readers if node in written_inputs(r)), None)
    if overwriting is not None:
        raise Refused(
            f"the attention weights are changed in place after the softmax "
            f"(`{op_name(overwriting)}`)",
            "change the scores before the softmax instead",
        )
    if len(readers) == 1 and readers[0].op != "output":
        return readers[0]
    if not readers:
        raise Refused("the attention weights are not used")
    raise read_elsewhere("weights", readers, node)


def read_elsewhere(what: str, readers: list[Node], node: Node) -> Refused:
    """The refusal for scores or weights that something other than the attention reads."""
    if any(reader.op == "output" for reader in readers):
        also = "also returned" if len(readers) > 1 or what == "scores" else "returned"
        return Refused(
            f"the attention {what} are {also}, so they must exist",
            "return only the output, or set output_attentions=False",
        )
    # One product with v is the attention; where all are products, all after the first are others.
    others = [r for r in readers if contraction(r) is None or what == "scores"] or readers[1:]
    names = ", ".join(
        f"`{op_name(reader)}`" + "".join(f" ({line})" for line in where(reader)[-1:])
        for reader in others
    )
    return Refused(
        f"the attention {what} are also read by {names}, so they must exist",
        f"use the attention {what} for the output only",
    )


def _passes(reader: Node, node: Node, changes: Changes) -> bool:
    """Whether the weights go on, changed in a way that is known; notes how."""
    if is_reshape(reader):
        before, after = values.shape(node), values.shape(reader)
        return len(after) >= 2 and values.same_shape(before[-2:], after[-2:])
    call = canonical(reader)
    if call is None or call.in_place or call.args.get("input") is not node:
        return False
    if call.op == "dropout":
        return _drops(dropout_of(call), changes)
    if call.op == "nan_to_num" and call.args["nan"] in (None, 0):
        changes.zeroed = True
        return True
    if call.op == "masked_fill" and values.number(call.args["value"]) == 0.0:
        changes.masks = (*changes.masks, call.args["mask"])
        return True
    if call.op == "cast":
        return values.is_float(reader) and values.same_device(node, reader)
    return call.op == "copy"


def _drops(probability: float, changes: Changes) -> bool:
    if probability and changes.dropout:
        raise Refused("dropout is applied to the attention weights twice", "apply it once")
    changes.dropout = changes.dropout or probability
    return True


def _with_v(
    product: Contraction,
    node: Node,
    nodes: tuple[Node, ...],
    shapes: tuple[tuple[Any, ...], ...],
    changes: Changes,
) -> WeightsPath:
    call = canonical(product.node)
    if call is not None and call.op == "baddbmm":
        raise Refused("the output is accumulated onto another tensor by baddbmm", "use bmm")
    weights, v = product.left, product.right
    if weights.node is v.node or node not in (weights.node, v.node):
        raise Refused("the attention weights are not multiplied with v")
    if v.node is node:
        weights, v = v, weights
    _check(weights.axes, v.axes, product)
    return WeightsPath(product, weights.axes, v, nodes, shapes, changes)


def _check(weights: Letters, v: Letters, product: Contraction) -> None:
    *batch, query, key = weights
    if product.summed != {key} or key not in v:
        raise Refused(
            "the weights and v are not summed over the keys, the axis of the softmax",
            "multiply weights [.., N, N] with v [.., N, D]",
        )
    features = [letter for letter in v if letter not in weights]
    if query in v or len(features) != 1 or len(weights) > 5:
        raise Refused("v has axes that are neither batch, heads, keys nor features")
    if set(product.out) != {*batch, query, features[0]}:
        raise Refused("the output lacks an axis of the weights")


def product_below(node: Node, hops: int = 8) -> bool:
    """Whether a tensor derived from ``node`` is multiplied with another one a few nodes below."""
    below = breadth_first(node, lambda n: filter(_is_matrix, n.users), hops)
    return any(contraction(reader) is not None for reader in below)


def _is_matrix(node: Node) -> bool:
    return len(values.shape(node)) >= 2 or contraction(node) is not None

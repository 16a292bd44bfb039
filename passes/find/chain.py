"""Steps that programs take from products of q and k to scores, followed backwards."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sympy
from torch.fx import Node

from sparse_compile.expr import MaskExpr
from sparse_compile.passes.find import values
from sparse_compile.passes.find.canonical import Call, canonical, is_reshape, op_name, where
from sparse_compile.passes.find.contraction import Contraction, contraction
from sparse_compile.passes.find.dataflow import Dataflow, constant
from sparse_compile.passes.find.scores import product_above
from sparse_compile.passes.mutation import memory_of
from sparse_compile.sites.operands import MaskOperand, Operand, Scope
from sparse_compile.sites.site import AttentionSite, Refused
from sparse_compile.spec.indexer import Step

#: Calls that read a tensor's shape, dtype or device, not its values.
READS_NO_VALUES = frozenset(
    "size dim shape zeros_like ones_like full_like empty_like new_zeros new_ones new_full "
    "new_empty sym_size sym_stride sym_numel _assert_tensor_metadata".split()
)


#: Of a spec, until the mask on the scores is lifted: mask, fill, and whether that is added.
UNMASKED = MaskExpr(sympy.true), float("-inf"), False


class Chain:
    """A chain of steps that only one another read.

    Attributes:
        scope, flow: where it stands.
        mask: the mask on the scores, if there is one.
        nodes: of the chain, last first.
        others: nodes outside of it that may read it, too, since they go as well.
    """

    def __init__(self, scope: Scope, others: Collection[Node] = ()) -> None:
        self.scope, self.flow = scope, Dataflow(memory_of(scope))
        self.mask: MaskOperand | None = None
        self.nodes: list[Node] = []
        self.others = set(others)

    def taken(self, node: Any, reader: Node) -> Node:
        """A step of the chain, which only ``reader`` reads: a tensor, or its last overwriting."""
        if not isinstance(node, Node) or not values.is_float(node):
            raise not_an_indexer()
        step = self.flow.current(node, reader)
        if step is not node and (call := canonical(step)) is not None and not call.in_place:
            raise Refused("its scores are overwritten")
        for user in {**node.users, **step.users}:
            goes = user in (reader, step) or user in self.others
            reads = not goes and op_name(user) not in READS_NO_VALUES
            if reads and self.flow.current(node, user) is step:
                raise Refused(f"its scores are also read by `{op_name(user)}`")
        self.nodes.append(reader)
        return step

    def masked(self, node: Node) -> Node:
        """What a mask is on, or the node itself."""
        call = canonical(node)
        if call is None:
            return node
        args = call.args
        if call.op in ("masked_fill", "where"):
            role = "drop" if call.op == "masked_fill" else "keep"
            mask = args["mask"] if call.op == "masked_fill" else args["condition"]
            fill = args["value"] if call.op == "masked_fill" else args["other"]
            number = constant(fill, self.flow)
            if number is None:
                raise Refused("the score of masked keys is known only at run time")
            self.mask = MaskOperand(mask, role, number)
            return self.taken(args["input"], node)
        if call.op == "add" and values.number(args["alpha"]) == 1.0:
            for score, mask in ((args["input"], args["other"]), (args["other"], args["input"])):
                if isinstance(mask, Node) and isinstance(score, Node) and product_above(score):
                    self.mask = MaskOperand(mask, "add")
                    return self.taken(score, node)
        return node

    def steps(self, node: Node) -> tuple[tuple[Step, ...], Node]:
        """The numbers that scores are multiplied with or divided by, in order, and what they are.

        Reshapes that only drop or add an axis of size one are passed.
        """
        steps: list[Step] = []
        while True:
            call = canonical(node)
            if is_reshape(node):
                if not _same_axes(node, node.args[0]):
                    raise Refused("its scores are reshaped")
                node = self.taken(node.args[0], node)
                continue
            step = None if call is None else _step(call)
            if step is None:
                return tuple(steps[::-1]), node
            steps.append(step[0])
            node = self.taken(step[1], node)

    def factors(
        self, node: Node, axes: Sequence[str], shown: str
    ) -> tuple[Operand, Operand, dict[str, str]]:
        """q and k of scores with these axes, by letters, and what the letters mean."""
        product = self.contraction(node)
        if len(product.out) != 4 or len(product.summed) != 1:
            raise Refused(f"its scores are not products of {shown}")
        meaning = dict(zip(product.out, axes, strict=True))
        meaning |= dict.fromkeys(product.summed, "d")
        self.nodes.append(node)
        if "t" in product.left.renamed(meaning).axes:
            return product.right, product.left, meaning
        return product.left, product.right, meaning

    def contraction(self, node: Node) -> Contraction:
        """A product of two tensors, in their own dtype."""
        product = contraction(node)
        call = canonical(node)
        if product is None or call is None or call.op == "baddbmm":
            raise Refused("its scores are not products of q and k")
        if len({values.dtype(n) for n in (node, product.left.node, product.right.node)}) != 1:
            raise Refused("autocast computes its scores in another dtype")
        return product

    def by_head(self, node: Node) -> tuple[Operand, Operand]:
        """q and k, whose products [B, H, Nq, Nkv] are; one key head for all serves, too."""
        shown = "q [B, H, Nq, D] and k [B, H, Nkv, D]"
        q, k, meaning = self.factors(node, "bhnt", shown)
        heads = dict(zip(k.renamed(meaning).axes, values.shape(k.node), strict=True)).get("h", 1)
        wanted = "bdt" if values.same(heads, 1) else "bhdt"
        return operand_of(q, meaning, "bhnd"), operand_of(k, meaning, wanted)

    def as_attention(
        self, output: Operand, q: Operand, k: Operand, axes: tuple[str, ...]
    ) -> AttentionSite:
        """The scores as those of an attention, so that their masks are lifted."""
        keys = Operand(k.node, tuple("n" if axis == "t" else axis for axis in k.axes))
        return AttentionSite(
            self.scope,
            output,
            q,
            keys,
            keys,
            1.0,
            "eager",
            masks=() if self.mask is None else (self.mask,),
            score_axes=axes,
            where=where(output.node),
            region=tuple(self.nodes),
        )

    def check_operands(self, operands: Sequence[Operand], last: Node) -> None:
        """Sizes agree, and nothing overwrites an operand between the products and ``last``."""
        sizes: dict[str, Any] = {}
        for operand in operands:
            if not self.flow.stays(operand.node, self.nodes[-1], last):
                raise Refused(f"`{operand.node.name}` is overwritten")
            for axis, size in zip(operand.axes, values.shape(operand.node), strict=True):
                if axis != "1" and not values.same(sizes.setdefault(axis, size), size):
                    raise Refused("its operands differ in their sizes")


def _step(call: Call) -> tuple[Step, Any] | None:
    """What a call multiplies with a number or divides by one, and the tensor that it is done to."""
    if call.op not in ("mul", "div") or call.args.get("rounding_mode") is not None:
        return None
    pairs = [(call.args["input"], call.args["other"])]
    pairs += [pairs[0][::-1]] if call.op == "mul" else []
    for score, number in pairs:
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            return (call.op, float(number)), score
    return None


def _same_axes(a: Node, b: Any) -> bool:
    """Whether two shapes differ in axes of size one at most."""
    left, right = ([n for n in values.shape(x) if not values.same(n, 1)] for x in (a, b))
    return values.same_shape(tuple(left), tuple(right))


def operand_of(factor: Operand, meaning: Mapping[str, str], wanted: str) -> Operand:
    """A factor with the meaning of its axes; those of size one that are not wanted are ``1``."""
    names = {axis: meaning.get(axis, "1") for axis in factor.axes}
    operand = factor.renamed({axis: n if n in wanted else "1" for axis, n in names.items()})
    sizes = zip(operand.axes, values.shape(operand.node), strict=True)
    if any(axis == "1" and not values.same(size, 1) for axis, size in sizes):
        raise not_an_indexer()
    if sorted(axis for axis in operand.axes if axis != "1") != sorted(wanted):
        raise not_an_indexer()
    return operand


def not_an_indexer() -> Refused:
    """What is said of scores of another kind."""
    return Refused("its scores are not those of an indexer, sum_h w_h * relu(q_h . k)")

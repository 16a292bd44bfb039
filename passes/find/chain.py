"""Steps that programs take from products of q and k to scores, followed backwards."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch.fx import Node

from sparse_compile.passes.find import values
from sparse_compile.passes.find.canonical import Call, canonical, is_reshape, op_name
from sparse_compile.passes.find.constants import constant
from sparse_compile.passes.find.contraction import Contraction, contraction
from sparse_compile.passes.find.dataflow import dataflow_of
from sparse_compile.passes.find.provenance import where
from sparse_compile.passes.find.refusal import Refusal
from sparse_compile.sites.site import AttentionSite, MaskOperand, Operand, Scope
from sparse_compile.spec.indexer import Step

#: Calls that read a tensor's shape, dtype or device, not its values.
READS_NO_VALUES = frozenset(
    "size dim shape zeros_like ones_like full_like empty_like new_zeros new_ones new_full "
    "new_empty".split()
)


class Chain:
    """A chain of steps that only one another read.

    Attributes:
        scope, flow: where it stands.
        mask: the mask on the scores, if there is one.
        nodes: of the chain, last first.
        others: nodes outside of it that may read it, too, since they go as well.
    """

    def __init__(self, scope: Scope, others: Collection[Node] = ()) -> None:
        self.scope, self.flow = scope, dataflow_of(scope)
        self.mask: MaskOperand | None = None
        self.nodes: list[Node] = []
        self.others = set(others)

    def _taken(self, node: Any, reader: Node) -> Node:
        """A step of the chain, which only ``reader`` reads: a tensor, or its last overwriting."""
        if not isinstance(node, Node) or not values.is_float(node):
            raise not_an_indexer()
        step = self.flow.current(node, reader)
        if step is not node and (call := canonical(step)) is not None and not call.in_place:
            raise Refusal("its scores are overwritten")
        for user in {**node.users, **step.users}:
            goes = user in (reader, step) or user in self.others
            reads = not goes and op_name(user) not in READS_NO_VALUES
            if reads and self.flow.current(node, user) is step:
                raise Refusal(f"its scores are also read by `{op_name(user)}`")
        self.nodes.append(reader)
        return step

    def _masked(self, node: Node) -> Node:
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
                raise Refusal("the score of masked keys is known only at run time")
            self.mask = MaskOperand(mask, role, number)
            return self._taken(args["input"], node)
        if call.op == "add" and values.number(args["alpha"]) == 1.0:
            for score, mask in ((args["input"], args["other"]), (args["other"], args["input"])):
                if isinstance(mask, Node) and _is_product(score):
                    self.mask = MaskOperand(mask, "add")
                    return self._taken(score, node)
        return node

    def _steps(self, node: Node) -> tuple[tuple[Step, ...], Node]:
        """The numbers that scores are multiplied with or divided by, in order, and what they are.

        Reshapes that only drop or add an axis of size one are passed.
        """
        steps: list[Step] = []
        while True:
            call = canonical(node)
            if is_reshape(node):
                if not _same_axes(node, node.args[0]):
                    raise Refusal("its scores are reshaped")
                node = self._taken(node.args[0], node)
                continue
            step = None if call is None else _step(call)
            if step is None:
                return tuple(steps[::-1]), node
            steps.append(step[0])
            node = self._taken(step[1], node)

    def _contraction(self, node: Node) -> Contraction:
        product = contraction(node)
        call = canonical(node)
        if product is None or call is None or call.op == "baddbmm":
            raise Refusal("its scores are not products of q and k")
        tensors = [values.tensor(n) for n in (node, product.left, product.right)]
        if len({tensor.dtype for tensor in tensors if tensor is not None}) != 1:
            raise Refusal("autocast computes its scores in another dtype")
        return product

    def _by_head(self, node: Node) -> tuple[Operand, Operand]:
        """q and k, whose products [B, H, Nq, Nkv] are; one key head for all serves, too."""
        product = self._contraction(node)
        if len(product.out_letters) != 4 or len(product.summed) != 1:
            raise Refusal("its scores are not products of q [B, H, Nq, D] and k [B, H, Nkv, D]")
        meaning = dict(zip(product.out_letters, "bhnt", strict=True))
        (feature,) = product.summed
        meaning[feature] = "d"
        sides = [(product.left, product.left_letters), (product.right, product.right_letters)]
        if "t" in {meaning[letter] for letter in product.left_letters}:
            sides.reverse()
        (q, q_letters), (k, k_letters) = sides
        shape = dict(zip((meaning[letter] for letter in k_letters), values.shape(k), strict=True))
        shared = values.same(shape.get("h", 1), 1)
        self.nodes.append(node)
        return (
            operand_of(q, q_letters, meaning, "bhnd"),
            operand_of(k, k_letters, meaning, "bdt" if shared else "bhdt"),
        )

    def _as_attention(
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

    def _check_operands(self, operands: Sequence[Operand], last: Node) -> None:
        """Sizes agree, and nothing overwrites an operand between the products and ``last``."""
        sizes: dict[str, Any] = {}
        for operand in operands:
            if not self.flow.stays(operand.node, self.nodes[-1], last):
                raise Refusal(f"`{operand.node.name}` is overwritten")
            for axis, size in zip(operand.axes, values.shape(operand.node), strict=True):
                if axis != "1" and not values.same(sizes.setdefault(axis, size), size):
                    raise Refusal("its operands differ in their sizes")


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


def _is_product(node: Any) -> bool:
    """Whether a tensor is made of a product or a sum, by steps."""
    while isinstance(node, Node):
        if contraction(node) is not None or op_name(node) == "sum":
            return True
        call = canonical(node)
        step = None if call is None else _step(call)
        if step is None and not is_reshape(node):
            return False
        node = node.args[0] if step is None else step[1]
    return False


def _same_axes(a: Node, b: Any) -> bool:
    """Whether two shapes differ in axes of size one at most."""
    left, right = ([n for n in values.shape(x) if not values.same(n, 1)] for x in (a, b))
    return values.same_shape(tuple(left), tuple(right))


def operand_of(
    node: Node, letters: Sequence[str], meaning: Mapping[str, str], wanted: str
) -> Operand:
    """A factor with the meaning of its axes; those of size one that are not wanted are ``1``."""
    axes = tuple(
        meaning[letter] if meaning.get(letter, "") in tuple(wanted) else "1" for letter in letters
    )
    sizes = zip(axes, values.shape(node), strict=True)
    if any(axis == "1" and not values.same(size, 1) for axis, size in sizes):
        raise not_an_indexer()
    if sorted(axis for axis in axes if axis != "1") != sorted(wanted):
        raise not_an_indexer()
    return Operand(node, axes)


def not_an_indexer() -> Refusal:
    """What is said of scores of another kind."""
    return Refusal("its scores are not those of an indexer, sum_h w_h * relu(q_h . k)")

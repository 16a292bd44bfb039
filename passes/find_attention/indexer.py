"""Where the indices of a selection come from, if that is a top-k of an indexer.

An indexer scores every key for every query, ``sum_h w_h * relu(q_h . k)``, and keeps the best. Its
scores are the one tensor [Nq, Nkv] that attention over selected keys would leave in the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from sparse_compile.indexer_spec import Step
from sparse_compile.passes.find_attention import values
from sparse_compile.passes.find_attention.canonical import Call, canonical, is_reshape, op_name
from sparse_compile.passes.find_attention.constants import constant
from sparse_compile.passes.find_attention.contraction import Contraction, contraction
from sparse_compile.passes.find_attention.dataflow import dataflow_of
from sparse_compile.passes.find_attention.provenance import where
from sparse_compile.passes.find_attention.refusal import Refusal
from sparse_compile.site import (
    AttentionSite,
    IndexerSite,
    LiftedMask,
    MaskOperand,
    Operand,
    Rejection,
    Scope,
)


def find_indexer(lifted: LiftedMask) -> IndexerSite | Rejection | None:
    """The indexer that selects the keys of a mask.

    Returns:
        why its top-k is none, or must stay, if it is not one; None for a mask that selects no keys
        by a top-k.
    """
    source = lifted.selection.source if lifted.selection else None
    if source is None:
        return None
    assert lifted.scope is not None
    try:
        return _Match(source, lifted.scope).found()
    except Refusal as refusal:
        return Rejection(refusal.reason, refusal.hint, where(source), source)


class _Match:
    """The steps of an indexer, from its top-k backwards.

    Attributes:
        index: the indices.
        mask: the mask on the scores, if there is one.
        q, k, w: the operands; ``axes`` are among ``b``, ``n`` (queries), ``t`` (keys), ``h``, ``d``
            and, for axes of size one that say nothing, ``1``.
        before, after, product: as in :class:`IndexerSpec`.
    """

    def __init__(self, index: Node, scope: Scope) -> None:
        """Match.

        Raises:
            Refusal: it is not an indexer, or one that something else reads.
        """
        self.index, self.scope, self.flow = index, scope, dataflow_of(scope)
        self.mask: MaskOperand | None = None
        self.nodes: list[Node] = []
        self.product = True
        (topk,) = index.all_input_nodes
        scores = self._topk(topk)
        scores = self._masked(scores, topk)
        self.after, scores = self._steps(scores)
        each = self._summed(scores) if op_name(scores) == "sum" else self._weighted(scores)
        self.before, product = self._steps(self._relu(each))
        self._scored(product)
        self._check_operands()

    # From the top-k to the products -----------------------------------------------------------

    def _topk(self, topk: Node) -> Node:
        if any(user.users for user in topk.users if user is not self.index):
            raise Refusal("its values are read, too")
        names = ("input", "k", "dim", "largest", "sorted")
        given: dict[str, Any] = {**dict(zip(names, topk.args, strict=False)), **topk.kwargs}
        if given.get("dim", -1) not in (-1, len(values.shape(given["input"])) - 1):
            raise Refusal("it does not run over the keys")
        flags = given.get("largest", True), given.get("sorted", True)
        if not all(isinstance(flag, bool) for flag in flags):
            raise Refusal("its order is known only at run time")
        self.most, self.largest, self.is_sorted = given["k"], *flags
        return self._taken(given["input"], topk)

    def _taken(self, node: Any, reader: Node) -> Node:
        """A step of the chain: only ``reader`` reads it, and nothing overwrites it."""
        if not isinstance(node, Node) or not values.is_float(node):
            raise _not_an_indexer()
        if self.flow.current(node, reader) is not node:
            raise Refusal("its scores are overwritten")
        others = [user for user in node.users if user is not reader]
        if others:
            raise Refusal(f"its scores are also read by `{op_name(others[0])}`")
        self.nodes.append(reader)
        return node

    def _masked(self, node: Node, topk: Node) -> Node:
        call = canonical(node)
        if call is None or call.in_place:
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
                node = self._taken(node.args[0], node)
                continue
            step = None if call is None or call.in_place else self._step(call)
            if step is None:
                return tuple(steps[::-1]), node
            steps.append(step[0])
            node = self._taken(step[1], node)

    def _step(self, call: Call) -> tuple[Step, Any] | None:
        if call.op not in ("mul", "div") or call.args.get("rounding_mode") is not None:
            return None
        pairs = [(call.args["input"], call.args["other"])]
        pairs += [pairs[0][::-1]] if call.op == "mul" else []
        for score, number in pairs:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                return (call.op, float(number)), score
        return None

    def _relu(self, node: Node) -> Node:
        if op_name(node) != "relu" or node.kwargs.get("inplace") or len(node.args) > 1:
            raise _not_an_indexer()
        return self._taken(node.all_input_nodes[0], node)

    # The two products --------------------------------------------------------------------------

    def _weighted(self, node: Node) -> Node:
        """The sum over heads, as a product with the weights; hands on the factor of a relu."""
        product = self._contraction(node)
        sides = [(product.left, product.right), (product.right, product.left)]
        letters = [product.left_letters, product.right_letters]
        for number, (weights, each) in enumerate(sides):
            if op_name(each) != "relu":
                continue
            each_letters, weight_letters = letters[1 - number], letters[number]
            (head,) = product.summed
            tokens = [letter for letter in each_letters if letter != head]
            if len(tokens) != 3 or product.out_letters[0] != tokens[0]:
                break
            if product.out_letters[-1] != tokens[-1]:
                break
            self._name(each_letters, head, tokens)
            self.w = _operand(weights, weight_letters, self._meaning, "bnh")
            return self._taken(each, node)
        raise _not_an_indexer()

    def _summed(self, node: Node) -> Node:
        """The sum over heads, as a sum of products with the weights; hands on the relu."""
        self.product = False
        given = {**dict(zip(("input", "dim"), node.args, strict=False)), **node.kwargs}
        dims = given.pop("dim", None)
        dim = dims[0] if isinstance(dims, (list, tuple)) and len(dims) == 1 else dims
        call = canonical(given.pop("input"))
        if given or call is None or call.op != "mul" or call.in_place or not isinstance(dim, int):
            raise _not_an_indexer()
        factors = call.args["input"], call.args["other"]
        for each, weights in (factors, factors[::-1]):
            ranks = {len(values.shape(n)) if isinstance(n, Node) else 0 for n in factors}
            if ranks != {4} or op_name(each) != "relu":
                continue
            letters = ("x0", "x1", "x2", "x3")
            head = letters[dim % 4]
            tokens = [letter for letter in letters if letter != head]
            self._name(letters, head, tokens)
            self.w = _operand(weights, letters, self._meaning, "bnh")
            product = node.all_input_nodes[0]
            self._taken(product, node)
            return self._taken(each, product)
        raise _not_an_indexer()

    def _name(self, each: Sequence[str], head: str, tokens: Sequence[str]) -> None:
        """Say what the axes of the scores of each head are."""
        self._meaning = {**dict(zip(tokens, "bnt", strict=True)), head: "h"}
        self._each = tuple(self._meaning[letter] for letter in each)

    def _scored(self, node: Node) -> None:
        product = self._contraction(node)
        if len(product.out_letters) != 4 or len(product.summed) != 1:
            raise Refusal("its scores are not products of q [B, Nq, H, D] and k [B, Nkv, D]")
        meaning = dict(zip(product.out_letters, self._each, strict=True))
        (feature,) = product.summed
        meaning[feature] = "d"
        sides = [(product.left, product.left_letters), (product.right, product.right_letters)]
        if "t" in {meaning[letter] for letter in product.left_letters}:
            sides.reverse()
        self.q, self.k = (
            _operand(factor, letters, meaning, wanted)
            for (factor, letters), wanted in zip(sides, ("bnhd", "bdt"), strict=True)
        )
        self.nodes.append(node)

    def _contraction(self, node: Node) -> Contraction:
        product = contraction(node)
        call = canonical(node)
        if product is None or call is None or call.op == "baddbmm":
            raise Refusal("its scores are not products of q and k")
        tensors = [values.tensor(n) for n in (node, product.left, product.right)]
        if len({tensor.dtype for tensor in tensors if tensor is not None}) != 1:
            raise Refusal("autocast computes its scores in another dtype")
        return product

    def _check_operands(self) -> None:
        topk = self.index.all_input_nodes[0]
        sizes: dict[str, Any] = {}
        for operand in (self.q, self.k, self.w):
            if not self.flow.stays(operand.node, self.nodes[-1], topk):
                raise Refusal(f"`{operand.node.name}` is overwritten")
            for axis, size in zip(operand.axes, values.shape(operand.node), strict=True):
                if axis != "1" and not values.same(sizes.setdefault(axis, size), size):
                    raise Refusal("its operands differ in their sizes")

    def found(self) -> IndexerSite:
        """What was matched, with its scores as those of an attention, so that masks are lifted."""
        k = Operand(self.k.node, tuple("n" if axis == "t" else axis for axis in self.k.axes))
        scores = AttentionSite(
            self.scope,
            Operand(self.index, ("b", "n", "d")),
            self.q,
            k,
            k,
            1.0,
            "eager",
            masks=() if self.mask is None else (self.mask,),
            score_axes=("b", "q", "kv"),
            where=where(self.index),
            region=tuple(self.nodes),
        )
        flags = self.product, self.largest, self.is_sorted
        operands = self.q, self.k, self.w
        return IndexerSite(scores, *operands, self.most, self.before, self.after, *flags)


def _is_product(node: Any) -> bool:
    while isinstance(node, Node) and is_reshape(node):
        node = node.args[0]
    return isinstance(node, Node) and contraction(node) is not None


def _operand(node: Node, letters: Sequence[str], meaning: dict[str, str], wanted: str) -> Operand:
    """A factor with the meaning of its axes; those of size one that are not wanted are ``1``."""
    axes = tuple(
        meaning[letter] if meaning.get(letter, "") in tuple(wanted) else "1" for letter in letters
    )
    sizes = zip(axes, values.shape(node), strict=True)
    if any(axis == "1" and not values.same(size, 1) for axis, size in sizes):
        raise _not_an_indexer()
    if sorted(axis for axis in axes if axis != "1") != sorted(wanted):
        raise _not_an_indexer()
    return Operand(node, axes)


def _not_an_indexer() -> Refusal:
    return Refusal("its scores are not those of an indexer, sum_h w_h * relu(q_h . k)")

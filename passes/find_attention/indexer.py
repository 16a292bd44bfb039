"""Where the indices of a selection come from, if that is a top-k of an indexer.

An indexer scores every key for every query, ``sum_h w_h * relu(q_h . k)``, and keeps the best. Its
scores are the one tensor [Nq, Nkv] that attention over selected keys would leave in the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from sparse_compile.passes.find_attention import values
from sparse_compile.passes.find_attention.block_scores import find_block_scores
from sparse_compile.passes.find_attention.canonical import canonical, op_name
from sparse_compile.passes.find_attention.chain import Chain, not_an_indexer, operand_of
from sparse_compile.passes.find_attention.only_comparison import only_comparison
from sparse_compile.passes.find_attention.provenance import where
from sparse_compile.passes.find_attention.refusal import Refusal
from sparse_compile.site import (
    AttentionSite,
    BlockScoresSite,
    IndexerSite,
    LiftedMask,
    Operand,
    Reached,
    Rejection,
    Scope,
)


def find_indexer(lifted: LiftedMask) -> IndexerSite | BlockScoresSite | Rejection | None:
    """The indexer that selects the keys of a mask.

    Returns:
        why its top-k is none, or must stay, if it is not one; None for a mask that selects no keys
        by a top-k, or by one whose scores are not of all keys.
    """
    if lifted.selection is None or not lifted.selection.best:
        return None
    assert lifted.scope is not None
    source, best = lifted.selection.source, lifted.selection.best
    try:
        pooled = find_block_scores(best, lifted.scope)
        reached = lifted.selection.reached
        if pooled is not None or (source is None and reached is None):
            return pooled
        if reached is not None:
            return _Match(reached.values, lifted.scope, reached).found()
        assert source is not None
        return _Match(source, lifted.scope).found()
    except Refusal as refusal:
        return Rejection(refusal.reason, refusal.hint, where(best[0]), best[0])


class _Match(Chain):
    """The steps of an indexer, from its top-k backwards.

    Attributes:
        index: the indices, or the values that others reach.
        reached: how, if so.
        q, k, w: the operands; ``axes`` are among ``b``, ``n`` (queries), ``t`` (keys), ``h``, ``d``
            and, for axes of size one that say nothing, ``1``.
        before, after, product: as in :class:`IndexerSpec`.
    """

    def __init__(self, index: Node, scope: Scope, reached: Reached | None = None) -> None:
        """Match.

        Raises:
            Refusal: it is not an indexer, or one that something else reads.
        """
        super().__init__(scope)
        self.index, self.reached, self.product = index, reached, True
        (topk,) = index.all_input_nodes
        scores = self._topk(topk)
        scores = self._masked(scores)
        self.after, scores = self._steps(scores)
        each = self._summed(scores) if op_name(scores) == "sum" else self._weighted(scores)
        self.before, product = self._steps(self._relu(each))
        self._scored(product)
        self._check_operands((self.q, self.k, self.w), topk)

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
        if self.reached is None:
            return self._taken(given["input"], topk)
        if not (self.largest if self.reached.least else self.is_sorted):
            raise Refusal("which of its values is the last of the best is not known")
        comparison = only_comparison(self.index, self.flow)
        scores = self._taken(given["input"], topk, comparison)
        sides = comparison.all_input_nodes
        if [self.flow.current(n, comparison) for n in sides].count(scores) != 1:
            raise Refusal("its values are not compared with the scores that they are of")
        return scores

    def _relu(self, node: Node) -> Node:
        if op_name(node) != "relu" or node.kwargs.get("inplace") or len(node.args) > 1:
            raise not_an_indexer()
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
            self.w = operand_of(weights, weight_letters, self._meaning, "bnh")
            return self._taken(each, node)
        raise not_an_indexer()

    def _summed(self, node: Node) -> Node:
        """The sum over heads, as a sum of products with the weights; hands on the relu."""
        self.product = False
        given = {**dict(zip(("input", "dim"), node.args, strict=False)), **node.kwargs}
        dims = given.pop("dim", None)
        dim = dims[0] if isinstance(dims, (list, tuple)) and len(dims) == 1 else dims
        call = canonical(given.pop("input"))
        if given or call is None or call.op != "mul" or call.in_place or not isinstance(dim, int):
            raise not_an_indexer()
        factors = call.args["input"], call.args["other"]
        for each, weights in (factors, factors[::-1]):
            ranks = {len(values.shape(n)) if isinstance(n, Node) else 0 for n in factors}
            if ranks != {4} or op_name(each) != "relu":
                continue
            letters = ("x0", "x1", "x2", "x3")
            head = letters[dim % 4]
            tokens = [letter for letter in letters if letter != head]
            self._name(letters, head, tokens)
            self.w = operand_of(weights, letters, self._meaning, "bnh")
            product = node.all_input_nodes[0]
            self._taken(product, node)
            return self._taken(each, product)
        raise not_an_indexer()

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
            operand_of(factor, letters, meaning, wanted)
            for (factor, letters), wanted in zip(sides, ("bnhd", "bdt"), strict=True)
        )
        narrowed = _narrowed(self.q), _narrowed(self.k)
        self.single = all(operand is not None for operand in narrowed)
        self.q, self.k = (
            before or operand if self.single else operand
            for before, operand in zip(narrowed, (self.q, self.k), strict=True)
        )
        self.nodes.append(node)

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
        flags = self.product, self.largest, self.is_sorted, self.single
        operands = self.q, self.k, self.w
        steps = self.before, self.after
        return IndexerSite(scores, *operands, self.most, *steps, *flags, self.reached)


def _narrowed(operand: Operand) -> Operand | None:
    """What an operand was before it was made fp32 from half precision; None if it was not."""
    node, axes = operand.node, operand.axes
    while op_name(node) == "unsqueeze":
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if not isinstance(dim, int) or axes[dim] != "1":
            return None
        dim %= len(axes)
        node, axes = node.all_input_nodes[0], axes[:dim] + axes[dim + 1 :]
    call, made = canonical(node), values.tensor(node)
    if call is None or call.op != "cast" or made is None or made.dtype != torch.float32:
        return None
    before = node.all_input_nodes[0]
    example = values.tensor(before)
    is_half = example is not None and example.dtype in (torch.float16, torch.bfloat16)
    return Operand(before, axes) if is_half else None

"""Where the indices of a selection come from, if that is a top-k of an indexer.

An indexer scores every key for every query, ``sum_h w_h * relu(q_h . k)``, and keeps the best. Its
scores are the one tensor [Nq, Nkv] that attention over selected keys would leave in the program.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from sparse_compile.passes.find import values
from sparse_compile.passes.find.block_scores import find_block_scores
from sparse_compile.passes.find.canonical import canonical, op_name
from sparse_compile.passes.find.chain import not_an_indexer, operand_of
from sparse_compile.passes.find.own_scores import find_own_scores
from sparse_compile.passes.find.provenance import where
from sparse_compile.passes.find.ranked import RankedChain
from sparse_compile.passes.find.refusal import Refusal
from sparse_compile.sites.site import (
    AttentionSite,
    IndexerSite,
    LiftedMask,
    Operand,
    Reached,
    Rejection,
    Scope,
    ScoringSite,
)


def find_indexer(site: AttentionSite, lifted: LiftedMask) -> ScoringSite | Rejection | None:
    """What scores the keys that a mask selects: an indexer, or the attention itself.

    Args:
        site: the attention.
        lifted: its mask.

    Returns:
        why its top-k is none, or must stay, if it is not one; None for a mask that selects no keys
        by a top-k, or by one whose scores are not of all keys.
    """
    if lifted.selection is None or not lifted.selection.best:
        return None
    assert lifted.scope is not None
    source, best = lifted.selection.source, lifted.selection.best
    try:
        reached = lifted.selection.reached
        ranked = source if reached is None else reached.values
        if site.ranked is not None and ranked is not None:
            return find_own_scores(ranked, lifted.scope, reached, site.region)
        pooled = find_block_scores(best, lifted.scope)
        if pooled is not None or ranked is None:
            return pooled
        return _Match(ranked, lifted.scope, reached).found()
    except Refusal as refusal:
        return Rejection(refusal.reason, refusal.hint, where(best[0]), best[0])


class _Match(RankedChain):
    """The steps of an indexer, from its top-k backwards.

    Attributes:
        q, k, w: the operands; ``axes`` are among ``b``, ``n`` (queries), ``t`` (keys), ``h``, ``d``
            and, for axes of size one that say nothing, ``1``.
        before, after, product: as in :class:`IndexerSpec`.
    """

    def __init__(self, index: Node, scope: Scope, reached: Reached | None = None) -> None:
        """Match.

        Raises:
            Refusal: it is not an indexer, or one that something else reads.
        """
        super().__init__(index, scope, reached)
        self.product = True
        scores = self._masked(self._ranked())
        self.after, scores = self._steps(scores)
        each = self._summed(scores) if op_name(scores) == "sum" else self._weighted(scores)
        self.before, product = self._steps(self._relu(each))
        self._scored(product)
        self._check_operands((self.q, self.k, self.w), self.topk)

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
        """What was matched."""
        output = Operand(self.index, ("b", "n", "d"))
        scores = self._as_attention(output, self.q, self.k, ("b", "q", "kv"))
        flags = self.product, self.largest, self.is_sorted, self.single
        operands, steps = (self.q, self.k, self.w), (self.before, self.after)
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

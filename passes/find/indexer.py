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
from sparse_compile.passes.find.canonical import Call, canonical, op_name
from sparse_compile.passes.find.chain import UNMASKED, not_an_indexer, operand_of
from sparse_compile.passes.find.ranked import RankedChain, find_own_scores
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
from sparse_compile.spec.indexer import IndexerSpec


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
        return refusal.of(best[0])


class _Match(RankedChain):
    """The steps of an indexer, from its top-k backwards.

    Attributes:
        q, k, w: the operands; ``axes`` are among ``b``, ``n`` (queries), ``t`` (keys), ``h``, ``d``
            and, for axes of size one that say nothing, ``1``.
        before, after, product, single: as in :class:`IndexerSpec`.
    """

    def __init__(self, index: Node, scope: Scope, reached: Reached | None = None) -> None:
        """Match.

        Raises:
            Refusal: it is not an indexer, or one that something else reads.
        """
        super().__init__(index, scope, reached)
        self.after, scores = self.steps(self.masked(self.ranked()))
        call = canonical(scores)
        if call is not None and call.op == "sum":
            each, self.product = self._summed(scores, call), False
        else:
            each, self.product = self._weighted(scores), True
        self.before, product = self.steps(self._relu(each))
        self._scored(product)
        self.check_operands((self.q, self.k, self.w), self.topk)

    def _relu(self, node: Node) -> Node:
        call = canonical(node)
        if call is None or call.op != "relu" or call.args["inplace"]:
            raise not_an_indexer()
        return self.taken(call.args["input"], node)

    # The two products --------------------------------------------------------------------------

    def _weighted(self, node: Node) -> Node:
        """The sum over heads, as a product with the weights; hands on the factor of a relu."""
        product = self.contraction(node)
        sides, out = (product.left, product.right), product.out
        for each, weights in (sides, sides[::-1]):
            if op_name(each.node) != "relu":
                continue
            (head,) = product.summed
            tokens = [letter for letter in each.axes if letter != head]
            if len(tokens) != 3 or (out[0], out[-1]) != (tokens[0], tokens[-1]):
                break
            self._name(each.axes, head, tokens)
            self.w = operand_of(weights, self._meaning, "bnh")
            return self.taken(each.node, node)
        raise not_an_indexer()

    def _summed(self, node: Node, call: Call) -> Node:
        """The sum over heads, as a sum of products with the weights; hands on the relu."""
        dims, rest = call.args["dim"], (call.args["keepdim"], call.args["dtype"])
        dim = dims[0] if isinstance(dims, (list, tuple)) and len(dims) == 1 else dims
        product = canonical(call.args["input"])
        if product is None or product.op != "mul" or product.in_place:
            raise not_an_indexer()
        factors = product.args["input"], product.args["other"]
        ranks = {len(values.shape(n)) if isinstance(n, Node) else 0 for n in factors}
        if rest != (False, None) or not isinstance(dim, int) or ranks != {4}:
            raise not_an_indexer()
        for each, weights in (factors, factors[::-1]):
            if op_name(each) == "relu":
                letters = ("x0", "x1", "x2", "x3")
                head = letters[dim % 4]
                self._name(letters, head, [letter for letter in letters if letter != head])
                self.w = operand_of(Operand(weights, letters), self._meaning, "bnh")
                self.taken(call.args["input"], node)
                return self.taken(each, call.args["input"])
        raise not_an_indexer()

    def _name(self, each: Sequence[str], head: str, tokens: Sequence[str]) -> None:
        """Say what the axes of the scores of each head are."""
        self._meaning = {**dict(zip(tokens, "bnt", strict=True)), head: "h"}
        self._each = tuple(self._meaning[letter] for letter in each)

    def _scored(self, node: Node) -> None:
        q, k, meaning = self.factors(node, self._each, "q [B, Nq, H, D] and k [B, Nkv, D]")
        self.q, self.k = operand_of(q, meaning, "bnhd"), operand_of(k, meaning, "bdt")
        before_q, before_k = _narrowed(self.q), _narrowed(self.k)
        self.single = before_q is not None and before_k is not None
        if before_q is not None and before_k is not None:
            self.q, self.k = before_q, before_k

    def found(self) -> IndexerSite:
        """What was matched."""
        output = Operand(self.index, ("b", "n", "d"))
        scores = self.as_attention(output, self.q, self.k, ("b", "q", "kv"))
        flags = self.largest, self.is_sorted, self.single
        spec = IndexerSpec(self.before, self.after, self.product, *UNMASKED, *flags)
        return IndexerSite(scores, self.w, self.most, spec, self.reached)


def _narrowed(operand: Operand) -> Operand | None:
    """What an operand was before it was made fp32 from half precision; None if it was not."""
    node, axes = operand.node, operand.axes
    while (call := canonical(node)) is not None and call.op == "unsqueeze":
        dim = call.args["dim"]
        if not isinstance(dim, int) or axes[dim] != "1":
            return None
        dim %= len(axes)
        node, axes = call.args["input"], axes[:dim] + axes[dim + 1 :]
    if call is None or call.op != "cast" or values.dtype(node) is not torch.float32:
        return None
    before = call.args["input"]
    is_half = values.dtype(before) in (torch.float16, torch.bfloat16)
    return Operand(before, axes) if is_half else None

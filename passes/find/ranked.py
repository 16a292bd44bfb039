"""Chains of steps up to a top-k; those of an attention's own scores."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch.fx import Node

from sparse_compile.passes.find import values
from sparse_compile.passes.find.canonical import canonical, op_name
from sparse_compile.passes.find.chain import READS_NO_VALUES, UNMASKED, Chain
from sparse_compile.passes.find.dataflow import Dataflow, breadth_first
from sparse_compile.passes.find.refusal import Refusal
from sparse_compile.sites.site import IndexerSite, Operand, Reached, Scope
from sparse_compile.spec.indexer import IndexerSpec


class RankedChain(Chain):
    """A chain of which a top-k keeps the best.

    Attributes:
        index: the indices of the top-k, or the values that others reach.
        reached: how, if so.
        topk: the top-k.
        most, largest, is_sorted: its arguments.
    """

    def __init__(
        self, index: Node, scope: Scope, reached: Reached | None, others: Collection[Node] = ()
    ) -> None:
        super().__init__(scope, others)
        self.index, self.reached = index, reached
        (self.topk,) = index.all_input_nodes

    def check_operands(self, operands: Sequence[Operand], last: Node) -> None:
        """As for every chain; what others reach is computed later than the top-k was."""
        super().check_operands(operands, last)
        changed = [o.node.name for o in operands if self.flow.is_mutated(o.node)]
        if self.reached is not None and changed:
            raise Refusal(f"`{changed[0]}` is overwritten")

    def ranked(self) -> Node:
        """The scores that the top-k is of.

        Raises:
            Refusal: something else reads what it returns, or it runs over another axis.
        """
        topk = self.topk
        if any(user.users for user in topk.users if user is not self.index):
            raise Refusal("its values are read, too")
        call = canonical(topk)
        if call is None:
            raise Refusal("it is called in an unknown way")
        given = call.args
        if given["dim"] not in (-1, len(values.shape(given["input"])) - 1):
            raise Refusal("it does not run over the keys")
        self.most, self.largest, self.is_sorted = given["k"], given["largest"], given["sorted"]
        if not (isinstance(self.largest, bool) and isinstance(self.is_sorted, bool)):
            raise Refusal("its order is known only at run time")
        if self.reached is None:
            return self.taken(given["input"], topk)
        if not (self.largest if self.reached.least else self.is_sorted):
            raise Refusal("which of its values is the last of the best is not known")
        comparison = _only_comparison(self.index, self.flow)
        self.others.add(comparison)
        scores = self.taken(given["input"], topk)
        sides = comparison.all_input_nodes
        if [self.flow.current(n, comparison) for n in sides].count(scores) != 1:
            raise Refusal("its values are not compared with the scores that they are of")
        return scores


def find_own_scores(
    index: Node, scope: Scope, reached: Reached | None, attention: Collection[Node]
) -> IndexerSite:
    """The scores that a top-k is taken of, and that become the weights of an attention.

    ``scores.masked_fill(scores < scores.topk(k).values[..., -1:], -inf).softmax(-1)`` and the same
    by index, after https://arxiv.org/abs/1912.11637: the scores have to be computed to find the
    best, but only those of some queries at a time.

    Args:
        index: the indices of the top-k, or the values that others reach.
        scope: where it stands.
        reached: how, if so.
        attention: what becomes of the scores, which goes with them.

    Raises:
        Refusal: they are made in another way, or something else reads them, too.
    """
    chain = RankedChain(index, scope, reached, attention)
    before, product = chain.steps(chain.masked(chain.ranked()))
    q, k = chain.by_head(product)
    chain.check_operands((q, k), chain.topk)
    output = Operand(index, ("b", "h", "n", "d"))
    scores = chain.as_attention(output, q, k, ("b", "h", "q", "kv"))
    spec = IndexerSpec(before, (), False, *UNMASKED, chain.largest, chain.is_sorted)
    return IndexerSite(scores, None, chain.most, spec, reached)


def _only_comparison(ranked: Node, flow: Dataflow) -> Node:
    """The node that compares ``ranked``, or what is made of it.

    Raises:
        Refusal: there are several, or something else reads the values, or overwrites them.
    """
    found: list[Node] = []
    for node in breadth_first(ranked, _readers):
        example = node.meta.get("example_value")
        if values.dtype(node) is torch.bool:
            found.append(node)
        elif not (values.is_float(node) or isinstance(example, (tuple, list))):
            raise Refusal("its values are read, too")
        elif flow.is_mutated(node):
            raise Refusal("its values are overwritten")
    if len(found) != 1:
        raise Refusal("its values are read, too")
    return found[0]


def _readers(node: Node) -> list[Node]:
    """What reads the values of a node, but for comparisons."""
    readers = [] if values.dtype(node) is torch.bool else list(node.users)
    return [reader for reader in readers if op_name(reader) not in READS_NO_VALUES]

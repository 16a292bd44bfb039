"""An attention's own scores, where it attends to the best of them alone.

``scores.masked_fill(scores < scores.topk(k).values[..., -1:], -inf).softmax(-1)`` and the same by
index, after https://arxiv.org/abs/1912.11637: the scores have to be computed to find the best, but
only those of some queries at a time.
"""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Node

from sparse_compile.passes.find.ranked import RankedChain
from sparse_compile.sites.site import IndexerSite, Operand, Reached, Scope


def find_own_scores(
    index: Node, scope: Scope, reached: Reached | None, attention: Collection[Node]
) -> IndexerSite:
    """The scores that a top-k is taken of, and that become the weights of an attention.

    Args:
        index: the indices of the top-k, or the values that others reach.
        scope: where it stands.
        reached: how, if so.
        attention: what becomes of the scores, which goes with them.

    Raises:
        Refusal: they are made in another way, or something else reads them, too.
    """
    return _Match(index, scope, reached, attention).found()


class _Match(RankedChain):
    """The steps of scores, from their top-k backwards.

    Attributes:
        q, k: the operands; ``axes`` are among ``b``, ``h``, ``n`` (queries), ``t`` (keys), ``d``.
        before: the steps from products to scores.
    """

    def __init__(
        self, index: Node, scope: Scope, reached: Reached | None, attention: Collection[Node]
    ) -> None:
        super().__init__(index, scope, reached, attention)
        self.before, product = self._steps(self._masked(self._ranked()))
        self.q, self.k = self._by_head(product)
        self._check_operands((self.q, self.k), self.topk)

    def found(self) -> IndexerSite:
        """What was matched."""
        axes = ("b", "h", "q", "kv")
        scores = self._as_attention(Operand(self.index, ("b", "h", "n", "d")), self.q, self.k, axes)
        flags = False, self.largest, self.is_sorted, False
        ranked = self.most, self.before, (), *flags, self.reached
        return IndexerSite(scores, self.q, self.k, None, *ranked)

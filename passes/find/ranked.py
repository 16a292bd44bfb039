"""Chains of steps up to a top-k."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch.fx import Node

from sparse_compile.passes.find import values
from sparse_compile.passes.find.chain import Chain
from sparse_compile.passes.find.only_comparison import only_comparison
from sparse_compile.passes.find.refusal import Refusal
from sparse_compile.sites.site import Operand, Reached, Scope


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

    def _check_operands(self, operands: Sequence[Operand], last: Node) -> None:
        """As for every chain; what others reach is computed later than the top-k was."""
        super()._check_operands(operands, last)
        changed = [o.node.name for o in operands if self.flow.is_mutated(o.node)]
        if self.reached is not None and changed:
            raise Refusal(f"`{changed[0]}` is overwritten")

    def _ranked(self) -> Node:
        """The scores that the top-k is of.

        Raises:
            Refusal: something else reads what it returns, or it runs over another axis.
        """
        topk = self.topk
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
        self.others.add(comparison)
        scores = self._taken(given["input"], topk)
        sides = comparison.all_input_nodes
        if [self.flow.current(n, comparison) for n in sides].count(scores) != 1:
            raise Refusal("its values are not compared with the scores that they are of")
        return scores

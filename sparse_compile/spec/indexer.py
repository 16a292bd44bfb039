"""IndexerSpec and BlockScoresSpec: what is computed where only the best scores are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparse_compile.expr import MaskExpr
from sparse_compile.spec.json_text import SpelledInJson

#: A scores' step: ``("mul", 0.25)`` or ``("div", 8.0)``.
Step = tuple[str, float]


def stepped(score: Tensor, steps: Sequence[Step]) -> Tensor:
    """Scores after some steps, each rounded as in the program."""
    for name, number in steps:
        score = score * number if name == "mul" else score / number
    return score


@dataclass(frozen=True)
class IndexerSpec(SpelledInJson):
    """The steps of an indexer, as the program writes them, so that its arithmetic is the program's.

    Attributes:
        before: what happens to the products of q and k before the relu.
        after: what happens to the weighted sum over heads.
        product: whether that sum is a product of matrices, else it is a sum of products.
        mask: who may be selected by whom, over ``b, q, kv``; the others get ``fill``.
        fill: see ``mask``.
        adds: whether the fill is added to their scores, else it takes their place.
        largest, is_sorted: of the top-k.
        single: whether q and k, in half precision, count as fp32.

    >>> from sparse_compile.expr import KV, Q
    >>> inf = float("inf")
    >>> spec = IndexerSpec((("mul", 0.25),), (), True, MaskExpr(KV <= Q), -inf, False)
    >>> IndexerSpec.parse(spec.text) == spec
    True
    """

    before: tuple[Step, ...]
    after: tuple[Step, ...]
    product: bool
    mask: MaskExpr
    fill: float
    adds: bool
    largest: bool = True
    is_sorted: bool = True
    single: bool = False

    @property
    def factor(self) -> float | None:
        """All steps as one factor on the scores; None where a relu comes between.

        >>> import sympy
        >>> steps = (("mul", 3.0), ("div", 4.0))
        >>> IndexerSpec(steps, (), True, MaskExpr(sympy.true), 0, False).factor
        0.75
        """
        product = 1.0
        for name, number in (*self.before, *self.after):
            product = product * number if name == "mul" else product / number
        positive = all(number > 0 for _, number in self.before)
        return product if positive and math.isfinite(product) else None


@dataclass(frozen=True)
class BlockScoresSpec(SpelledInJson):
    """The steps from products of q and k to the highest of each block, as the program writes them.

    Attributes:
        size: consecutive keys in a block.
        before: what happens to the products of q and k.
        mask: which scores stay as they are, over ``b, h, q, kv``; the others get ``fill``.
        fill: see ``mask``.
        adds: whether the fill is added to their scores, else it takes their place.
        padding: the score of the keys that the last block lacks.

    >>> from sparse_compile.expr import KV, Q
    >>> inf = float("inf")
    >>> spec = BlockScoresSpec(64, (("mul", 0.25),), MaskExpr(KV <= Q), -inf, False, -inf)
    >>> BlockScoresSpec.parse(spec.text) == spec
    True
    """

    size: int
    before: tuple[Step, ...]
    mask: MaskExpr
    fill: float
    adds: bool
    padding: float

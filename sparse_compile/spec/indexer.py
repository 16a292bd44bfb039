"""IndexerSpec: what an indexer computes, the scores of which only the best are kept."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparse_compile.expr import MaskExpr
from sparse_compile.spec.json_text import from_json, to_json

if TYPE_CHECKING:
    from torch import Tensor

#: A scores' step: ``("mul", 0.25)`` or ``("div", 8.0)``.
Step = tuple[str, float]


def stepped(score: Tensor, steps: Sequence[Step]) -> Tensor:
    """Scores after some steps, each rounded as in the program."""
    for name, number in steps:
        score = score * number if name == "mul" else score / number
    return score


@dataclass(frozen=True)
class IndexerSpec:
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

    @functools.cached_property
    def text(self) -> str:
        """A stable one-line JSON spelling; :meth:`parse` reads it back."""
        return to_json(self)

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> IndexerSpec:
        """The spec that :attr:`text` spelled.

        >>> from sparse_compile.expr import KV, Q
        >>> inf = float("inf")
        >>> spec = IndexerSpec((("mul", 0.25),), (), True, MaskExpr(KV <= Q), -inf, False)
        >>> IndexerSpec.parse(spec.text) == spec
        True
        """
        return IndexerSpec(**from_json(text))

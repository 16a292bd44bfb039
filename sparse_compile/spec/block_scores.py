"""BlockScoresSpec: how the highest score of each block of keys is computed."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from sparse_compile.expr import MaskExpr
from sparse_compile.spec.indexer import Step
from sparse_compile.spec.json_text import from_json, to_json


@dataclass(frozen=True)
class BlockScoresSpec:
    """The steps from products of q and k to the highest of each block, as the program writes them.

    Attributes:
        size: consecutive keys in a block.
        before: what happens to the products of q and k.
        mask: which scores stay as they are, over ``b, h, q, kv``; the others get ``fill``.
        fill: see ``mask``.
        adds: whether the fill is added to their scores, else it takes their place.
        padding: the score of the keys that the last block lacks.
    """

    size: int
    before: tuple[Step, ...]
    mask: MaskExpr
    fill: float
    adds: bool
    padding: float

    @functools.cached_property
    def text(self) -> str:
        """A stable one-line JSON spelling; :meth:`parse` reads it back."""
        return to_json(self)

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> BlockScoresSpec:
        """The spec that :attr:`text` spelled.

        >>> from sparse_compile.expr import KV, Q
        >>> inf = float("inf")
        >>> spec = BlockScoresSpec(64, (("mul", 0.25),), MaskExpr(KV <= Q), -inf, False, -inf)
        >>> BlockScoresSpec.parse(spec.text) == spec
        True
        """
        return BlockScoresSpec(**from_json(text))

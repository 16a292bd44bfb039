"""BlockScoresSpec: how the highest score of each block of keys is computed."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

from sparse_compile.expr import MaskExpr
from sparse_compile.spec.indexer import Step


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
        fields = {
            "size": self.size,
            "before": self.before,
            "mask": self.mask.text,
            "fills": [repr(self.fill), repr(self.padding)],
            "adds": self.adds,
        }
        return json.dumps(fields, separators=(",", ":"))

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
        fields = json.loads(text)
        before = tuple((name, float(number)) for name, number in fields["before"])
        fill, padding = map(float, fields["fills"])
        mask = MaskExpr.parse(fields["mask"])
        return BlockScoresSpec(fields["size"], before, mask, fill, fields["adds"], padding)

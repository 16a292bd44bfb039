"""Dropout of attention weights: which pairs stay, as a function of a seed and of coordinates.

Kernels that see a pair, forward or backward, compute the same answer and store nothing. The hash is
``lowbias32`` (https://nullprogram.com/blog/2018/07/31/), applied to each coordinate in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from sparse_compile.expr.nodes import KV, Q

#: What coordinates are multiplied with, so that neighbours differ in many bits.
SPREAD = {"b": 0x9E3779B1, "h": 0x85EBCA77, "q": 0xC2B2AE3D, "kv": 0x27D4EB2F}
#: Bits of a hash that are compared with a threshold.
BITS = 24


@dataclass(frozen=True)
class Dropout:
    """That weights are dropped.

    Attributes:
        probability: 0 to 1, of a weight to become 0; the others are divided by the rest of it.
        seed: number of the learned tensor that holds the seed, int64 [2], each below 2 ** 31.
        q, kv: the query and the key of a pair, in terms of its coordinates.
    """

    probability: float
    seed: int = 0
    q: sympy.Expr = Q
    kv: sympy.Expr = KV

    @property
    def threshold(self) -> int:
        """Hashes below it stay; of :data:`BITS` bits."""
        return round((1.0 - self.probability) * (1 << BITS))

    @property
    def factor(self) -> float:
        """What weights that stay are multiplied with; 0 where none does."""
        return 0.0 if self.probability >= 1.0 else 1.0 / (1.0 - self.probability)

"""BlockDiffusion: noisy blocks that see the clean ones before them."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from sparse_compile.expr.nodes import KV, N_KV, FloorDiv, Q
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import Positive, bad


@dataclass(frozen=True, repr=False)
class BlockDiffusion(Pattern):
    """Training of block diffusion: the noisy sequence, and behind it the clean one.

    A noisy token attends to its own noisy block and to the clean blocks before it; a clean token to
    the clean blocks up to its own. Arriola et al. 2025 (BD3-LM), https://arxiv.org/abs/2503.09573.
    The clean half alone, as in sampling, is ``BlockLocal(block) | Causal()``.

    Args:
        block: tokens that are denoised together; the last block may be shorter.

    >>> BlockDiffusion(1).dense(4, 4)[0, 0].int().tolist()
    [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """

    block: Positive

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """There must be two halves of equal length."""
        if n_q != n_kv or n_q % 2:
            raise bad(
                f"BlockDiffusion: {n_q} queries and {n_kv} keys are no two halves, noisy and clean",
                "Put the clean sequence behind the noisy one, of as many tokens.",
            )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """Of both noisy: the same block; of a clean key: an earlier block, or one up to a clean
        query's own.
        """
        half = FloorDiv(N_KV, 2)
        noisy_row, noisy_column = FloorDiv(Q, self.block), FloorDiv(KV, self.block)
        row, column = FloorDiv(Q - half, self.block), FloorDiv(KV - half, self.block)
        own = sympy.And(sympy.Lt(KV, half), sympy.Eq(noisy_column, noisy_row))
        earlier = sympy.And(sympy.Ge(KV, half), sympy.Lt(column, noisy_row))
        clean = sympy.And(sympy.Ge(KV, half), sympy.Le(column, row))
        return sympy.Or(
            sympy.And(sympy.Lt(Q, half), sympy.Or(own, earlier)),
            sympy.And(sympy.Ge(Q, half), clean),
        )

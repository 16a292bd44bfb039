"""Longformer: a sliding window with global tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import sympy

from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import UPPER_LEFT, Align, position, store, whole_from
from sparse_compile.patterns.global_ import Global, checked_tokens
from sparse_compile.patterns.local import within


@dataclass(frozen=True, repr=False)
class Longformer(Pattern):
    """The pattern of Longformer: near keys, and a few tokens that see and are seen by all.

    Beltagy et al. 2020, https://arxiv.org/abs/2004.05150.

    Args:
        window: the whole width, as in the paper: half of it to either side of the query.
        global_: how many tokens from the start are global, or which ones.
        align: the corner in which the diagonal starts, see :class:`Causal`.

    >>> Longformer(2).dense(5, 5)[0, 0].int().tolist()
    [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 1, 1, 1], [1, 0, 0, 1, 1]]
    """

    window: Annotated[int, whole_from(2)]
    global_: int | tuple[int, ...] = 1
    align: Align = UPPER_LEFT

    def __post_init__(self) -> None:
        super().__post_init__()
        store(self, global_=checked_tokens("Longformer", self.global_))

    @property
    def global_part(self) -> Global:
        """The global tokens alone."""
        return Global(self.global_, align=self.align)

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """Global tokens must exist."""
        self.global_part.check(n_q, n_kv, batch, heads)

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``abs(q - kv) <= window // 2``, or one of them is global."""
        half = self.window // 2
        near = within(position(self.align), half, half)
        return sympy.Or(near, self.global_part.predicate(tables))

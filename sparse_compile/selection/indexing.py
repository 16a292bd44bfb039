"""Indexing: what a lightning indexer scores tokens from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_compile.selection.visible import Visible


@dataclass(frozen=True, eq=False)
class Indexing:
    """Scores ``factor * sum_i w_i * relu(q_i . k)`` of tokens.

    Attributes:
        q: [B, H, Nq, D].
        k: [B, Nkv, D], same dtype.
        w: [B, Nq, H], floating.
        visible: in its runs; the scores of those that are not visible need not be written.
        factor: on the scores.
    """

    q: Tensor
    k: Tensor
    w: Tensor
    visible: Visible
    factor: float = 1.0

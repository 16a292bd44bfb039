"""Windows: queries, and keys of windows whose share of their attention scores blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.selection.visible import Visible


@dataclass(frozen=True)
class Windows:
    """Queries, and the keys of windows that they attend to.

    Attributes:
        q: [B, Hq, Nq, D].
        keys: [B, Hc, windows, D], floating; Hc divides Hq.
        scale: factor on their products.
        lists: of heads whose shares are summed; Hc divides it, and it divides Hq.
        unit: consecutive queries whose shares are summed; a power of two.
        span, per: cells of a window, and of a block.
        blocks: how many.
        visible: the mask, in single queries and cells.
        made_of: the dtype of what the keys are means of.
    """

    q: Tensor
    keys: Tensor
    scale: float
    lists: int
    unit: int
    span: int
    per: int
    blocks: int
    visible: Visible
    made_of: torch.dtype

    @property
    def heads(self) -> int:
        """Of a list."""
        return self.q.shape[1] // self.lists

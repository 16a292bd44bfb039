"""Results [B, H, N, D] in memory as [B, N, H, D]: what projections read, and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def room_like(of: Tensor, make: Callable[..., Tensor] = torch.empty) -> Tensor:
    """Room for a gradient of [B, H, N, D].

    >>> room_like(torch.ones(1, 2, 3, 4), torch.zeros).stride()
    (24, 4, 8, 1)
    """
    batch, heads, n, dim = of.shape
    return make((batch, n, heads, dim), dtype=of.dtype, device=of.device).transpose(1, 2)


def stored(t: Tensor, like: Tensor) -> Tensor:
    """The first rows and columns of a tensor, in the shape and the dtype of another one."""
    return room_like(like).copy_(t[..., : like.shape[2], : like.shape[3]])

"""MaskFunction: who may attend to whom, as the function that says so.

Models of transformers know their padding and their global tokens when they run. Where code runs as
it stands, a function that reads such tensors becomes a pattern. While torch.compile traces, it is
called with the coordinates of all pairs: the graph holds what it computes, and this library's
backend reads the mask out of that without making it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.api.attention import attention
from sparse_compile.patterns import Pattern, Predicate

#: ``fn(b, h, q, kv)``, true where query ``q`` may attend to key ``kv``.
Allowed = Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True, eq=False)
class MaskFunction:
    """A mask as a function of (b, h, q, kv), for all layers that share it.

    Args:
        allowed: computes with the coordinates as functions of FlexAttention do, and with nothing
            but operations that broadcast.
    """

    allowed: Allowed

    @functools.cached_property
    def pattern(self) -> Pattern:
        """The same as a pattern; it reads tensors of the function when attention runs."""
        return Predicate(self.allowed)

    def tensor(self, shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
        """The same as a bool tensor that broadcasts to ``shape``, [B, Hq, Nq, Nkv]."""
        places = [torch.arange(size, device=device) for size in shape]
        axes = [
            place.view([-1 if i == a else 1 for i in range(4)]) for a, place in enumerate(places)
        ]
        mask: Tensor = self.allowed(*axes)
        return mask


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskFunction, scale: float | None = None, **scores: Any
) -> Tensor:
    """:func:`sparse_compile.attention` with a mask function.

    Args:
        q, k, v: [B, H, N, D], as for ``attention``; ``scale`` and ``scores``, too.
        mask: who may attend to whom.
    """
    if not torch.compiler.is_compiling():
        return attention(q, k, v, mask.pattern, scale, **scores)
    dense = mask.tensor((q.shape[0], q.shape[1], q.shape[2], k.shape[2]), q.device)
    return attention(q, k, v, dense, scale, **scores)

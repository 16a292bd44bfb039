"""scored_attention: attention whose scores look up numbers with gradients, in a captured graph.

It has no kernel of its own, and nothing about it is planned: for every backend it is made of the
operators that it stands for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from sparse_compile.ops.fresh_size import unbound_sizes

_LIBRARY: Any = torch.library.Library("sparse_compile", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "scored_attention(Tensor q, Tensor k, Tensor v, Tensor[] learned, Tensor[] tables, str mask, "
    "str score, float scale) -> (Tensor, Tensor)"
)

#: The operator as nodes of a graph call it. q, k, v and the result are [B, H, N, D], and the second
#: result is the log-sum-exp, fp32 [B, Hq, Nq]; ``learned`` and ``tables`` are what the score
#: program and the mask read, whose texts are ``score`` and ``mask``.
SCORED_ATTENTION = torch.ops.sparse_compile.scored_attention.default

#: For q, k and v; and the rest.
Attend = Callable[
    [tuple[Tensor, Tensor, Tensor], Sequence[Tensor], Sequence[Tensor], str, str, float],
    tuple[Tensor, Tensor],
]


def composed_of(attend: Attend) -> None:
    """Say what the operator is made of."""

    def composed(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        # While Dynamo only asks for the shapes of the results, sizes inside belong to no node.
        asked = get_proxy_mode() is None
        with unbound_sizes(getattr(q, "fake_mode", None)) if asked else contextlib.nullcontext():
            return attend((q, k, v), *rest)

    _LIBRARY.impl("scored_attention", composed, "CompositeImplicitAutograd")

"""masked_attention: what a call of :func:`sparse_compile.attention` is in a captured graph.

It has no kernel of its own. This library's backend finds it like any other attention and plans it
for its real sizes; for any other backend it is made of the operators that it stands for.
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
    "masked_attention(Tensor q, Tensor k, Tensor v, Tensor[] given, Tensor? sinks, SymInt[] sizes, "
    "str mask, float scale) -> Tensor"
)
_LIBRARY.define(
    "masked_attention_and_lse(Tensor q, Tensor k, Tensor v, Tensor[] given, Tensor? sinks, "
    "SymInt[] sizes, str mask, float scale) -> (Tensor, Tensor)"
)

#: The operator as nodes of a graph call it. q, k, v and the result are [B, H, N, D]; ``given`` are
#: tensors that the mask selects by, or is, or reads; ``sinks`` [Hq] the scores of keys without a
#: value; ``sizes`` the integers of the mask, ``s0, s1, ...``; ``mask`` is the text of a
#: :class:`sparse_compile.sites.named.NamedMask`.
MASKED_ATTENTION = torch.ops.sparse_compile.masked_attention.default
#: The same, and the log-sum-exp of the scores, which no pass knows.
MASKED_ATTENTION_AND_LSE = torch.ops.sparse_compile.masked_attention_and_lse.default

#: For q, k and v; and the rest.
Attend = Callable[
    [tuple[Tensor, Tensor, Tensor], list[Tensor], Tensor | None, Sequence[int], str, float], Any
]


def composed_of(name: str, attend: Attend) -> None:
    """Say what the operator of this name is made of."""

    def composed(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        # While Dynamo only asks for the shape of the result, sizes inside belong to no node.
        asked = get_proxy_mode() is None
        with unbound_sizes(getattr(q, "fake_mode", None)) if asked else contextlib.nullcontext():
            return attend((q, k, v), *rest)

    _LIBRARY.impl(name, composed, "CompositeImplicitAutograd")

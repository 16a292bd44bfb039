"""The attention of Longformer and of LED's encoder: a window, and global tokens named in each call.

Beltagy et al. 2020, https://arxiv.org/abs/2004.05150. The classes of transformers cut the sequence
into overlapping chunks. This computes the same from the same parameters, in two calls of
:func:`sparse_compile.attention` that have no row in common: local tokens attend with one set of
projections to what is near and to global tokens, global tokens with another set to everything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_compile.integrations.transformers.masked import Allowed, MaskFunction, attend
from sparse_compile.integrations.transformers.refusals import refuse_dropout, refuse_weights


@dataclass(frozen=True, eq=False)
class Tokens:
    """What each token is; the masks of all layers follow from it.

    Attributes:
        padding, is_global: bool [B, N]; no token is both.
    """

    padding: Tensor
    is_global: Tensor
    _masks: dict[int | None, MaskFunction] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(marks: Tensor) -> Tokens:
        """From [B, N]: 0 where a token is padding, 1 where it is local, 2 where it is global."""
        return Tokens(marks == 0, marks == 2)

    def local(self, reach: int) -> MaskFunction:
        """Local tokens attend to the keys up to ``reach`` away, and to global ones."""
        if reach not in self._masks:
            self._masks[reach] = MaskFunction(_local(self.padding, self.is_global, reach))
        return self._masks[reach]

    def everything(self) -> MaskFunction:
        """Global tokens attend to all keys."""
        if None not in self._masks:
            self._masks[None] = MaskFunction(_everything(self.padding, self.is_global))
        return self._masks[None]

    def none_is_global(self) -> bool:
        """Whether that is known: it is not asked of a graph, which would break there."""
        return not torch.compiler.is_compiling() and not bool(self.is_global.any())


def _local(padding: Tensor, is_global: Tensor, reach: int) -> Allowed:
    def local(b: Any, h: Any, q: Any, kv: Any) -> Any:
        near = (abs(q - kv) <= reach) & ~padding[b, kv]
        return ~padding[b, q] & ~is_global[b, q] & (near | is_global[b, kv])

    return local


def _everything(padding: Tensor, is_global: Tensor) -> Allowed:
    return lambda b, h, q, kv: is_global[b, q] & ~padding[b, kv]


class WindowAndGlobal(nn.Module):
    """The forward of both classes, whose attributes have the same names."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | Tokens,
        is_index_masked: Tensor | None = None,
        is_index_global_attn: Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor]:
        """Attention, before its output projection.

        Args:
            hidden_states: [B, N, heads * D].
            attention_mask: what each token is; [B, N]: negative where it is padding, positive where
                it is global.
            is_index_masked, is_index_global_attn: not read, since ``attention_mask`` says as much.
            is_global_attn: False if no token is global; None where that is not known.
            output_attentions: must be False.

        Returns:
            [B, N, heads * D], 0 at padding.
        """
        refuse_weights(self, output_attentions)
        refuse_dropout(self, self.dropout)
        tokens = attention_mask
        if isinstance(tokens, Tensor):
            tokens = Tokens(tokens < 0, tokens > 0)
        mask = tokens.local(self.one_sided_attn_window_size)
        out = attend(*_split(self, hidden_states, (self.query, self.key, self.value)), mask)
        if is_global_attn is not False:
            projections = self.query_global, self.key_global, self.value_global
            # Rows of other tokens are 0 in each.
            out = out + attend(*_split(self, hidden_states, projections), tokens.everything())
        return (out.transpose(1, 2).reshape(hidden_states.shape),)

    def extra_repr(self) -> str:
        """What computes it."""
        return "by sparse_compile"


def _split(
    attention: Any, hidden: Tensor, projections: Iterable[nn.Module]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [B, heads, N, D] each."""
    sizes = *hidden.shape[:2], attention.num_heads, attention.head_dim
    q, k, v = (projection(hidden).view(sizes).transpose(1, 2) for projection in projections)
    return q, k, v


def through(
    layers: Iterable[Any], hidden: Tensor, tokens: Tokens, keep: bool, dropped: float = 0.0
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """The hidden states after all layers, [B, N, features]; and those before and between them.

    Args:
        layers: of an encoder.
        hidden: what enters it.
        tokens: what each token is.
        keep: whether those of all layers are kept.
        dropped: how probable it is that a layer is left out, as LED's are in training.
    """
    has_global, states = False if tokens.none_is_global() else None, [hidden]
    for layer in layers:
        if not dropped or torch.rand([]) >= dropped:
            hidden = layer(hidden, attention_mask=tokens, is_global_attn=has_global)[0]
        states = [*states, hidden] if keep else states
    return hidden, tuple(states) if keep else None


def either(given: bool | None, otherwise: bool) -> bool:
    """An argument of a call, or of the configuration where it is not given."""
    return otherwise if given is None else given

"""LongT5's encoder without blocks: the classes of transformers, under their own names.

Guo et al. 2022, https://arxiv.org/abs/2112.07916. They hold the same parameters under the same
names. Nothing is padded to whole blocks, no mask and no bias of pairs is made, and a graph that
torch.compile captures does not break. The decoder stays as it is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.longt5 import modeling_longt5 as modeling

from sparse_compile.errors import BadShape
from sparse_compile.expr import (
    KV,
    N_KV,
    N_Q,
    SCORE,
    B,
    FloorDiv,
    H,
    MaskExpr,
    Q,
    ScoreProgram,
    learned,
    table,
)
from sparse_compile.integrations.transformers.refusals import refuse_dropout, refuse_weights
from sparse_compile.integrations.transformers.scored import attend, joined
from sparse_compile.integrations.transformers.windowed import either

_BUCKETS = modeling.LongT5LocalAttention._relative_position_bucket


@dataclass(frozen=True, eq=False)
class Tokens:
    """What each token is.

    Attributes:
        real: bool [B, N], False at padding; None if nothing is.
    """

    real: Tensor | None
    _last: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def last(self, size: int) -> Tensor | None:
        """int32 [B]: the last block of ``size`` tokens whose last token is real; None if all are.

        The same tensor for all layers, so that they can share what follows from it.
        """
        if self.real is None:
            return None
        if size not in self._last:
            ends = self.real[:, size - 1 :: size]
            self._last[size] = ends.sum(1, dtype=torch.int32) - 1
        return self._last[size]

    def without_padding(self, x: Tensor) -> Tensor:
        """``x`` [B, N, ...], 0 at padding."""
        if self.real is None:
            return x
        return x.masked_fill(~self.real.view(*self.real.shape, *[1] * (x.dim() - 2)), 0.0)


class LongT5LocalAttention(modeling.LongT5LocalAttention):  # type: ignore[misc]
    """Attention to what is nearer than a block."""

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | Tokens | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Attention, and its output projection.

        Args:
            hidden_states: [B, N, features].
            mask: what each token is; as a tensor, what transformers' encoder makes of padding,
                bool [B, 1, blocks, block, 3 * block].
            position_bias: what the first layer returned; None in that layer.
            output_attentions: must be False.

        Returns:
            [B, N, features], and the biases of all distances, [heads, 2 * block - 1].
        """
        _refuse(self, position_bias, output_attentions)
        if isinstance(mask, Tensor):
            itself = mask[:, 0, :, :, self.block_len : 2 * self.block_len].diagonal(0, -2, -1)
            mask = Tokens(itself.flatten(1)[:, : hidden_states.shape[1]])
        bias = _near_bias(self, hidden_states) if position_bias is None else position_bias
        out, _ = _near(self, _projected(self, hidden_states), bias, _known(self, mask))
        return self.o(_unsplit(out)), bias

    def extra_repr(self) -> str:
        """What computes it."""
        return "by sparse_compile"


class LongT5TransientGlobalAttention(modeling.LongT5TransientGlobalAttention):  # type: ignore[misc]
    """Attention to what is nearer than a block, and to the sums of short blocks of all tokens."""

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | Tokens | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Attention, and its output projection.

        Args:
            hidden_states: [B, N, features].
            mask: what each token is; as a tensor, [B, N], 0 where it is padding.
            position_bias, output_attentions: as for :class:`LongT5LocalAttention`.

        Returns:
            [B, N, features]; and the biases, [heads, ...]: of all distances of tokens, and then of
            all distances of blocks.
        """
        _refuse(self, position_bias, output_attentions)
        tokens = _known(self, Tokens(mask != 0) if isinstance(mask, Tensor) else mask)
        bias = position_bias
        if bias is None:
            bias = torch.cat(
                [_near_bias(self, hidden_states), _side_bias(self, hidden_states)], dim=1
            )
        near, side = bias[:, : 2 * self.block_len - 1], bias[:, 2 * self.block_len - 1 :]
        operands = _projected(self, hidden_states)
        found = _near(self, operands, near, tokens)
        out = _unsplit(found[0])
        if hidden_states.shape[1] >= self.global_block_size:
            sides = _sides(self, hidden_states, operands[0], side, tokens)
            # A query that is padding has seen nothing but sums.
            out = tokens.without_padding(_unsplit(joined(found, sides)))
        return self.o(out), bias

    def extra_repr(self) -> str:
        """What computes it."""
        return "by sparse_compile"


class LongT5Stack(modeling.LongT5Stack):  # type: ignore[misc]
    """The encoder, or the decoder, which stays as it is."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **given: Any,
    ) -> Any:
        """As that of the base class, for an encoder without attention weights."""
        if self.is_decoder:
            ids = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
            return super().forward(attention_mask=attention_mask, **ids, **given)
        refuse_weights(self, either(given.get("output_attentions"), self.config.output_attentions))
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give input_ids or inputs_embeds, and not both.")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = Tokens(None if attention_mask is None else attention_mask != 0)
        hidden, bias, states = self.dropout(embeds), None, []
        for block in self.block:
            states.append(hidden)
            hidden, bias = block(hidden, tokens, bias)[:2]
        last = self.dropout(self.final_layer_norm(hidden))
        keep = either(given.get("output_hidden_states"), self.config.output_hidden_states)
        kept = (*states, last) if keep else None
        if not either(given.get("return_dict"), self.config.return_dict):
            return (last,) if kept is None else (last, kept)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=last, hidden_states=kept)


def _refuse(attention: Any, bias: Tensor | None, weights: bool) -> None:
    refuse_weights(attention, weights)
    refuse_dropout(attention, attention.dropout)
    if bias is not None and bias.dim() != 2:
        raise BadShape(
            f"sparse_compile: {type(attention).__name__} got a position bias of shape "
            f"{list(bias.shape)}, which a layer made that is not sparsified. Pass the whole "
            "encoder to sparsify()."
        )


def _known(attention: Any, tokens: Tokens | None) -> Tokens:
    """Which tokens are real; without a mask, the class of transformers attends to anything."""
    if tokens is None:
        raise BadShape(
            f"sparse_compile: {type(attention).__name__} got mask=None. Call the encoder, or pass "
            "the mask that it makes."
        )
    return tokens


def _split(x: Tensor, attention: Any) -> Tensor:
    """[B, N, heads * D] as [B, heads, N, D]."""
    sizes = *x.shape[:2], attention.n_heads, attention.key_value_proj_dim
    return x.view(sizes).transpose(1, 2)


def _unsplit(x: Tensor) -> Tensor:
    """The inverse of :func:`_split`."""
    return x.transpose(1, 2).flatten(2)


def _projected(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_split(f(hidden), attention) for f in (attention.q, attention.k, attention.v))
    return q, k, v


def _biases(attention: Any, table: Any, distances: Tensor) -> Tensor:
    """Of distances [n], for each head: [heads, n]."""
    buckets = _BUCKETS(
        distances,
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    values: Tensor = table(buckets)
    return values.t().contiguous()


def _near_bias(attention: Any, hidden: Tensor) -> Tensor:
    """For all distances of a token to one that it may attend to, the lowest first."""
    block, heads = attention.block_len, attention.n_heads
    if not attention.has_relative_attention_bias:
        return hidden.new_zeros(heads, 2 * block - 1)
    distances = torch.arange(1 - block, block, device=hidden.device)
    return _biases(attention, attention.relative_attention_bias, distances)


def _side_bias(attention: Any, hidden: Tensor) -> Tensor:
    """For all distances of a token's block to another, the lowest first."""
    size, heads = attention.global_block_size, attention.n_heads
    rows, count = -(-hidden.shape[1] // size), hidden.shape[1] // size
    if not attention.has_relative_attention_bias:
        return hidden.new_zeros(heads, rows + count + 1)
    distances = torch.arange(-rows, count + 1, device=hidden.device)
    return _biases(attention, attention.global_relative_attention_bias, distances)


def _near(
    attention: Any, operands: tuple[Tensor, Tensor, Tensor], bias: Tensor, tokens: Tokens
) -> tuple[Tensor, Tensor]:
    """Attention to what is near, 0 at padding; and its log-sum-exp."""
    mask, score = _near_texts(attention.block_len - 1, _dtype(bias), tokens.real is not None)
    tables = [] if tokens.real is None else [tokens.real]
    return attend(operands, [bias], tables, mask, score)


def _sides(
    attention: Any, hidden: Tensor, query: Tensor, bias: Tensor, tokens: Tokens
) -> tuple[Tensor, Tensor]:
    """Attention to the sums of blocks, [B, heads, N, D], and its log-sum-exp.

    The tokens of a block have the same biases. So the first tokens of all blocks are one head, the
    second ones another, and a bias depends on the distance of blocks alone.
    """
    size, length = attention.global_block_size, hidden.shape[1]
    rows = -(-length // size)
    last = tokens.last(size)  # the tokens behind it belong to it
    sums = attention.global_input_layer_norm(_sums(tokens.without_padding(hidden), size, last))
    k, v = _split(attention.k(sums), attention), _split(attention.v(sums), attention)
    batch, heads, _, features = query.shape
    q = F.pad(query, (0, 0, 0, rows * size - length)).view(batch, heads, rows, size, features)
    q = q.transpose(2, 3).reshape(batch, heads * size, rows, features)
    mask, score = _side_texts(size, _dtype(bias), last is not None)
    out, lse = attend((q, k, v), [bias], [] if last is None else [last], mask, score)
    found = (x.reshape(batch, heads, size, rows, *x.shape[3:]) for x in (out, lse))
    out, lse = (x.transpose(2, 3).flatten(2, 3)[:, :, :length] for x in found)
    return out, lse


def _sums(hidden: Tensor, size: int, last: Tensor | None) -> Tensor:
    """The sums of whole blocks [B, N // size, features]; what is behind ``last`` [B] is part of it.

    Args:
        hidden: [B, N, features], 0 at padding.
        size: tokens of a block.
        last: the number of the last block; None if that is the last whole one.
    """
    length = hidden.shape[1]
    count = length // size
    padded = F.pad(hidden, (0, 0, 0, -length % size))
    padded = padded.view(hidden.shape[0], -1, size, hidden.shape[2]).sum(2)
    number = torch.arange(padded.shape[1], device=hidden.device)[:, None]
    ends = count - 1 if last is None else last[:, None, None]
    rest = padded.masked_fill(number < ends, 0.0).sum(1, keepdim=True)
    sums = torch.where(number == ends, rest, padded.masked_fill(number > ends, 0.0))
    return sums[:, :count]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _near_texts(reach: int, dtype: str, padded: bool) -> tuple[str, str]:
    """Mask and score program of tokens that attend to those up to ``reach`` away."""
    return _near_programs(reach, dtype, padded)


@functools.lru_cache
def _near_programs(reach: int, dtype: str, padded: bool) -> tuple[str, str]:
    seen: sympy.Basic = sympy.Le(sympy.Abs(Q - KV), reach)
    tables: tuple[str, ...] = ()
    if padded:
        real, tables = table(0), ("bool",)
        seen = sympy.And(seen, sympy.Ne(real(B, Q), 0), sympy.Ne(real(B, KV), 0))
    score = ScoreProgram(SCORE + learned(0)(H, KV - Q + reach), (dtype,))
    return MaskExpr(seen, tables).text, score.text


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _side_texts(size: int, dtype: str, padded: bool) -> tuple[str, str]:
    """Mask and score program of tokens, a block to a row, that attend to the sums of blocks."""
    return _side_programs(size, dtype, padded)


@functools.lru_cache
def _side_programs(size: int, dtype: str, padded: bool) -> tuple[str, str]:
    bias, head = learned(0), FloorDiv(H, size)
    tables = ("int32",) if padded else ()
    last = table(0)(B) if padded else N_KV - 1
    # Tokens behind the last block belong to it.
    by_distance, of_last = bias(head, KV - Q + N_Q), bias(head, KV - last + N_Q)
    score = SCORE + sympy.Piecewise((by_distance, Q <= last), (of_last, True))
    seen = sympy.Le(KV, last) if padded else sympy.true
    return MaskExpr(seen, tables).text, ScoreProgram(score, (dtype,)).text

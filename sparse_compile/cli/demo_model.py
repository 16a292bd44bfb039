"""A decoder as people write them. It imports torch and knows nothing of sparse_compile.

RMSNorm, rotary embeddings, grouped-query attention, a causal sliding-window mask built from two
``arange`` in the forward, SwiGLU, and a next-token loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder; ``window`` counts the tokens a query sees, itself included."""

    layers: int = 2
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    window: int = 256
    vocabulary: int = 512


class Attention(nn.Module):
    """Grouped-query attention over a mask that the decoder hands in."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.query = nn.Linear(config.hidden, config.heads * config.head_dim, bias=False)
        self.key = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.value = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.heads * config.head_dim, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """[B, N, hidden] to [B, N, hidden]."""
        q = rotate(split_heads(self.query(x), self.heads), cos, sin)
        k = rotate(split_heads(self.key(x), self.kv_heads), cos, sin)
        v = split_heads(self.value(x), self.kv_heads)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        merged: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return merged


class Block(nn.Module):
    """Attention and a gated feed-forward layer, each behind a norm and a residual."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.hidden)
        self.gate = nn.Linear(config.hidden, 2 * config.hidden, bias=False)
        self.up = nn.Linear(config.hidden, 2 * config.hidden, bias=False)
        self.down = nn.Linear(2 * config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """[B, N, hidden] to [B, N, hidden]."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        y = self.feed_forward_norm(x)
        z: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return z


class Decoder(nn.Module):
    """Token ids [B, N] to the logits [B, N, vocabulary] of the next token."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits in the dtype of the weights."""
        x = self.embedding(tokens)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        query, key = position[:, None], position[None, :]
        mask = (key <= query) & (query - key < self.config.window)
        cos, sin = rotary_angles(position, self.config.head_dim, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        logits: Tensor = self.head(self.norm(x))
        return logits


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads * D] to [B, heads, N, D]."""
    batch, length, _ = x.shape
    return x.view(batch, length, heads, -1).transpose(1, 2)


def rotary_angles(position: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [N, D] of the rotary embedding."""
    exponent = torch.arange(0, head_dim, 2, device=position.device) / head_dim
    angle = position[:, None] * 10000.0**-exponent
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [B, H, N, D]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each next token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

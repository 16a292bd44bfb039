"""A small language model and the text it learns: the sources of Python's standard library.

Every machine with Python has this text, and its sha256 goes into the results. It repeats names over
long distances, so attention has something to look for far back. One module in ten is held out:
nothing is trained or chosen on it.
"""

from __future__ import annotations

import collections
import hashlib
import math
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: ``(q, k, v) -> out``, in PyTorch's shapes.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
WORD = re.compile(r"[A-Za-z_]+| +|\n +|.", re.DOTALL)


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of its training."""

    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    vocabulary: int = 1024
    context: int = 1024
    batch: int = 4
    steps: int = 1500
    rate: float = 3e-3
    most_bytes: int = 6_000_000


@dataclass(frozen=True)
class Text:
    """Tokens int64 [n] to train on, and those held out."""

    train: Tensor
    held_out: Tensor
    sha256: str

    def batches(self, config: Config, steps: int, seed: int) -> Iterator[Tensor]:
        """Random pieces of the training text: int64 [batch, context + 1]."""
        generator = torch.Generator().manual_seed(seed)
        reach = torch.arange(config.context + 1)
        for _ in range(steps):
            last = self.train.numel() - config.context - 1
            first = torch.randint(last, (config.batch, 1), generator=generator)
            yield started(self.train[first + reach])

    def held_out_rows(self, config: Config, most: int) -> Tensor:
        """Pieces of the held-out text, evenly spread: int64 [at most ``most``, context + 1]."""
        rows = self.held_out.unfold(0, config.context + 1, config.context)
        return started(rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).long()])


def started(rows: Tensor) -> Tensor:
    """Rows whose first token is byte 0, which no source has: it marks the start."""
    return torch.cat([torch.zeros_like(rows[:, :1]), rows[:, 1:]], 1)


def read_text(config: Config) -> Text:
    """The sources of the top-level modules of the standard library, in alphabetical order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    sources = [path.read_text("utf-8", "replace") for path in sorted(folder.glob("*.py"))]
    held, kept = "".join(sources[::10]), "".join(s for i, s in enumerate(sources) if i % 10)
    held, kept = held[: config.most_bytes // 10], kept[: config.most_bytes]
    words = vocabulary(kept, config.vocabulary)
    digest = hashlib.sha256((kept + held).encode()).hexdigest()
    return Text(encode(kept, words), encode(held, words), digest)


def vocabulary(text: str, size: int) -> dict[str, int]:
    """The words that save most, numbered after the 256 bytes."""
    saved = collections.Counter(WORD.findall(text))
    for word in saved:
        saved[word] *= len(word.encode()) - 1
    ordered = sorted(saved, key=lambda word: (-saved[word], word))
    return {word: 256 + i for i, word in enumerate(ordered[: size - 256])}


def encode(text: str, words: dict[str, int]) -> Tensor:
    """Tokens of a text: known words by number, everything else as bytes."""
    tokens: list[int] = []
    for word in WORD.findall(text):
        tokens += [words[word]] if word in words else word.encode()
    return torch.tensor(tokens)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def turns(length: int, half: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions: [length, 2 * half] each."""
    speed = torch.exp(torch.arange(half) * (-math.log(10000.0) / half))
    angle = torch.arange(length)[:, None] * speed
    return torch.cat([angle.cos()] * 2, 1), torch.cat([-angle.sin(), angle.sin()], 1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, H, N, D] with rotary positions."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class Attention(nn.Module):
    """Grouped-query attention; ``attend`` may be replaced."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.attend = config, causal
        width = config.heads * config.head_dim
        heads = config.heads + 2 * config.kv_heads
        self.qkv = nn.Linear(2 * width, heads * config.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.sharpness = nn.Parameter(torch.full((config.heads, 1, 1), 1.1))

    def forward(self, x: Tensor) -> Tensor:
        c = self.config
        # A token and the one before it: what followed a token elsewhere is found in one step.
        pair = torch.cat([x, F.pad(x, (0, 0, 1, -1))], -1)
        heads = self.qkv(pair).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
        q, k, v = heads.split([c.heads, c.kv_heads, c.kv_heads], 1)
        cos, sin = turns(x.shape[1], c.head_dim // 2)
        q, k = (rotated(F.layer_norm(t, (c.head_dim,)), cos, sin) for t in (q, k))
        out = self.attend(self.sharpness.exp() * q, k, v)
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.heads * config.head_dim
        self.attention = Attention(config)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class SmallLM(nn.Module):
    """Tokens int64 [B, N] to logits [B, N, vocabulary]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.heads * config.head_dim
        self.embedding = nn.Embedding(config.vocabulary, width)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.blocks(self.embedding(tokens) * 4)) @ self.embedding.weight.T

    def loss(self, rows: Tensor) -> Tensor:
        """Mean nats per token of rows of tokens [B, context + 1]."""
        return F.cross_entropy(self(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    @property
    def attentions(self) -> list[Attention]:
        return [block.attention for block in self.blocks]


def train(config: Config, text: Text, say: Callable[[str], None] = print) -> SmallLM:
    """A model trained from scratch."""
    torch.manual_seed(0)
    model = SmallLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, config.rate, total_steps=max(config.steps, 2), pct_start=0.1
    )
    for step, rows in enumerate(text.batches(config, config.steps, seed=1)):
        optimiser.zero_grad()
        loss = model.loss(rows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0 or step == config.steps - 1:
            say(f"language model, step {step}: {loss.item():.3f} nats per token")
    return model.eval().requires_grad_(False)

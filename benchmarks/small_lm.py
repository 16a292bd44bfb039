"""A small language model and the text it learns: sources of Python.

Every machine with Python has the sources of the standard library, and the sha256 of the text goes
into the results. They repeat names over long distances, so attention has something to look for far
back. One module in ten is held out: nothing is trained or chosen on it.
"""

from __future__ import annotations

import array
import collections
import copy
import functools
import hashlib
import importlib.util
import math
import multiprocessing
import re
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: ``(q, k, v) -> out``, in PyTorch's shapes.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
WORD = re.compile(r"[A-Za-z_]+| +|\n +|.", re.DOTALL)
#: Folders that are not ours to learn from, or hold tables rather than programs.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}
#: Characters that the words are counted in, and that one process encodes.
COUNTED, PIECE = 6_000_000, 2_000_000


@dataclass(frozen=True)
class Config:
    """Sizes of the model, of its training and of its text."""

    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    vocabulary: int = 1024
    context: int = 1024
    batch: int = 4
    steps: int = 1500
    rate: float = 3e-3
    decay: float = 0.1
    most_bytes: int = 6_000_000
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """Tokens int64 [n] to train on, and those held out."""

    train: Tensor
    held_out: Tensor
    sha256: str

    def to(self, device: torch.device) -> Text:
        return replace(self, train=self.train.to(device), held_out=self.held_out.to(device))

    def batches(self, config: Config, steps: int, seed: int) -> Iterator[Tensor]:
        """Random pieces of the training text: int64 [batch, context + 1]."""
        generator = torch.Generator().manual_seed(seed)
        reach = torch.arange(config.context + 1, device=self.train.device)
        for _ in range(steps):
            last = self.train.numel() - config.context - 1
            first = torch.randint(last, (config.batch, 1), generator=generator)
            yield started(self.train[first.to(reach.device) + reach])

    def held_out_rows(self, config: Config, most: int) -> Tensor:
        """Pieces of the held-out text, evenly spread: int64 [at most ``most``, context + 1]."""
        rows = self.held_out.unfold(0, config.context + 1, config.context)
        places = torch.linspace(0, len(rows) - 1, min(most, len(rows))).long()
        return started(rows[places.to(rows.device)])


def started(rows: Tensor) -> Tensor:
    """Rows whose first token is byte 0, which no source has: it marks the start."""
    return torch.cat([torch.zeros_like(rows[:, :1]), rows[:, 1:]], 1)


def read_text(config: Config) -> Text:
    """The sources of the standard library and of ``config.packages``, in alphabetical order."""
    sources = [path.read_text("utf-8", "replace") for path in modules(config.packages)]
    held, kept = "".join(sources[::10]), "".join(s for i, s in enumerate(sources) if i % 10)
    held, kept = held[: config.most_bytes // 10], kept[: config.most_bytes]
    words = vocabulary(kept[:COUNTED], config.vocabulary)
    digest = hashlib.sha256((kept + held).encode()).hexdigest()
    return Text(encode(kept, words), encode(held, words), digest)


def modules(packages: tuple[str, ...]) -> list[Path]:
    """The files of the standard library, then those of installed packages."""
    folders = [Path(sysconfig.get_paths()["stdlib"])]
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"No package {name!r} is installed. Leave it out of --packages.")
        folders.append(Path(spec.submodule_search_locations[0]))
    found = []
    for folder in folders:
        inside = (path for path in folder.rglob("*.py") if path.is_file())
        found += sorted(p for p in inside if not LEFT_OUT & set(p.relative_to(folder).parts))
    return found


def vocabulary(text: str, size: int) -> dict[str, int]:
    """The words that save most, numbered after the 256 bytes."""
    saved = collections.Counter(WORD.findall(text))
    for word in saved:
        saved[word] *= len(word.encode()) - 1
    ordered = sorted(saved, key=lambda word: (-saved[word], word))
    return {word: 256 + i for i, word in enumerate(ordered[: size - 256])}


def encode(text: str, words: dict[str, int]) -> Tensor:
    """Tokens of a text: known words by number, everything else as bytes."""
    pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
    if len(pieces) < 4:
        return torch.tensor([token for piece in pieces for token in numbers(words, piece)])
    # Plain lists of numbers would take longer to send than to make.
    with multiprocessing.get_context("fork").Pool() as pool:
        parts = pool.map(functools.partial(packed, words), pieces)
    return torch.cat([torch.frombuffer(part, dtype=torch.int16) for part in parts]).long()


def numbers(words: dict[str, int], text: str) -> list[int]:
    tokens: list[int] = []
    for word in WORD.findall(text):
        tokens += [words[word]] if word in words else word.encode()
    return tokens


def packed(words: dict[str, int], text: str) -> bytearray:
    return bytearray(array.array("h", numbers(words, text)).tobytes())


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)


def turns(length: int, half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions: [length, 2 * half] each."""
    speed = torch.exp(torch.arange(half, device=device) * (-math.log(10000.0) / half))
    angle = torch.arange(length, device=device)[:, None] * speed
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
        cos, sin = turns(x.shape[1], c.head_dim // 2, x.device)
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
    """Tokens int64 [B, N] to logits [B, N, vocabulary]; counts the ``steps`` of its training."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.steps = config, 0
        width = config.heads * config.head_dim
        self.embedding = nn.Embedding(config.vocabulary, width)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.blocks(self.embedding(tokens) * 4)) @ self.embedding.weight.T

    def losses(self, rows: Tensor) -> Tensor:
        """Mean nats per token of each row of tokens [B, context + 1]."""
        by_token = F.cross_entropy(self(rows[:, :-1]).mT, rows[:, 1:], reduction="none")
        return by_token.mean(1)

    def loss(self, rows: Tensor) -> Tensor:
        """Mean nats per token."""
        return F.cross_entropy(self(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    @property
    def attentions(self) -> list[Attention]:
        return [block.attention for block in self.blocks]


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 products on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def optimiser_of(model: nn.Module, rate: float, decay: float) -> torch.optim.Optimizer:
    """AdamW whose decay is of matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    fused = any(p.is_cuda for p in model.parameters())
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=fused)


def stepped(loss: Tensor, *trained: tuple[torch.optim.Optimizer, float]) -> None:
    """One step of optimisers, each at its rate, with gradients of a norm of at most 1."""
    for optimiser, _ in trained:
        optimiser.zero_grad()
    loss.backward()
    for optimiser, rate in trained:
        for group in optimiser.param_groups:
            group["lr"] = rate
        every = [p for group in optimiser.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(every, 1.0)
        optimiser.step()


def progress(steps: int, seconds: float = math.inf) -> Iterator[float]:
    """How much of the steps, or of the time, has passed: from 0 until 1 is reached."""
    start = time.monotonic()
    for step in range(steps):
        done = max(step / steps, (time.monotonic() - start) / seconds)
        if done >= 1:
            return
        yield done


def train(
    config: Config, text: Text, say: Callable[[str], None], seconds: float = math.inf, seed: int = 0
) -> SmallLM:
    """A model trained from scratch, at a rate that rises once and then stays.

    Who goes on training lets the rate fall to nothing, see :func:`trained_on`.
    """
    torch.manual_seed(seed)
    model = SmallLM(config).to(text.train.device)
    optimiser = optimiser_of(model, config.rate, config.decay)
    warm = min(200, config.steps // 10 + 1)
    batches = text.batches(config, config.steps, seed=1000 * seed + 1)
    for step, (_, rows) in enumerate(zip(progress(config.steps, seconds), batches, strict=False)):
        with autocast(rows.device):
            loss = model.loss(rows)
        stepped(loss, (optimiser, config.rate * min(1, (step + 1) / warm)))
        model.steps += 1
        if step % 50 == 0:
            say(f"language model, step {step}: {loss.item():.3f} nats per token")
    return model.eval()


def trained_on(
    model: SmallLM, text: Text, steps: int, rate: float, say: Callable[[str], None], seed: int
) -> SmallLM:
    """A copy that was trained on for some steps with dense attention; the rate falls to nothing."""
    model = copy.deepcopy(model).train()
    optimiser = optimiser_of(model, rate, model.config.decay)
    batches = text.batches(model.config, steps, seed)
    for done, rows in zip(progress(steps), batches, strict=False):
        with autocast(rows.device):
            loss = model.loss(rows)
        stepped(loss, (optimiser, rate * (1 - done)))
        model.steps += 1
    say(f"language model, {steps} steps more: {loss.item():.3f} nats per token")
    return model.eval()

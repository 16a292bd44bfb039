"""Distilling gates, and tuning a language model under the selection that they make.

First the model is frozen, and a :class:`PooledGate` for each layer learns its attention maps. Then
the model goes on training and attends to nothing but what its gates select. Three losses are added:

- the language model's, whose gradients are those of attention to the selected keys;
- the distillation of each gate to the attention of its layer, which the gate has to follow while
  the model changes, as DeepSeek-V3.2 does (https://arxiv.org/abs/2512.02556); it reaches the gate
  only;
- the attention that the selection misses, ``1 - recall``. It reaches queries and keys, so the
  attention moves to where the gate looks. Its weight is no choice: it rises while more is missed
  than wanted, and falls otherwise, so the model gives up no more than that takes.

For the second and the third the dense map is made, layer by layer: that is simple, and meant for
contexts that are short enough.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.gate_scorers import UNIT, Scorer, chosen, own_and_units
from benchmarks.small_lm import (
    Attend,
    Config,
    SmallLM,
    Text,
    autocast,
    causal,
    optimiser_of,
    progress,
    stepped,
)
from sparse_compile import patterns as P
from sparse_compile.selection import (
    PooledGate,
    distillation_loss,
    pooled_attention,
)


@dataclass(frozen=True)
class GateConfig:
    """Sizes of the gates, of their training and of the tuning."""

    width: int = 64
    rope: int = 32
    parts: int = 4
    batch: int = 1
    steps: int = 600
    rate: float = 3e-3
    #: Of the model under the selection; the gates then learn at a third of their first rate.
    tuning_steps: int = 300
    tuning_rate: float = 1e-3
    #: The recall that the weight of what is missed is steered to.
    aim: float = 0.97
    held_out_rows: int = 24


@contextmanager
def attending(model: SmallLM, by_layer: list[Attend]) -> Iterator[None]:
    """The layers attend by these functions of q, k and v."""
    for layer, attend in zip(model.attentions, by_layer, strict=True):
        layer.attend = attend
    try:
        yield
    finally:
        for layer in model.attentions:
            layer.attend = causal


@torch.no_grad()
def queries_and_keys(model: SmallLM, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What the dense attention of each layer sees, in fp32 and without gradient."""
    seen = []

    def watch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q.float(), k.float()))
        return causal(q, k, v)

    with attending(model, [watch] * len(model.attentions)), autocast(tokens.device):
        model(tokens)
    return seen


def new_gates(config: Config, gates: GateConfig, device: torch.device) -> nn.ModuleList:
    """A gate for each layer; every query head has scores of its own."""
    return nn.ModuleList(
        PooledGate(
            *(config.head_dim, config.heads, config.kv_heads),
            lists=config.heads,
            unit_kv=UNIT,
            width=gates.width,
            rope=gates.rope,
            parts=gates.parts,
        )
        for _ in range(config.layers)
    ).to(device)


def distil(
    model: SmallLM,
    text: Text,
    gates: GateConfig,
    say: Callable[[str], None],
    seconds: float = math.inf,
    seed: int = 0,
) -> nn.ModuleList:
    """A gate for each layer that has learned the attention maps of the frozen model."""
    torch.manual_seed(1000 * seed + 1)
    made = new_gates(model.config, gates, text.train.device)
    optimiser = optimiser_of(made, gates.rate, 0.0)
    batches = text.batches(replace(model.config, batch=gates.batch), gates.steps, 1000 * seed + 2)
    for step, (done, rows) in enumerate(zip(progress(gates.steps, seconds), batches, strict=False)):
        losses = [
            learnt(gate(q, k), mass_of(q, k))
            for gate, (q, k) in zip(made, queries_and_keys(model, rows[:, :-1]), strict=True)
        ]
        stepped(torch.stack(losses).sum(), (optimiser, gates.rate * warmed(done)))
        if step % 50 == 0:
            by_layer = ", ".join(f"{loss.item():.3f}" for loss in losses)
            say(f"gates, step {step}: divergence by layer {by_layer}")
    return made


def warmed(done: float) -> float:
    """The share of a rate: it rises for a tenth of the time, and falls to nothing."""
    return min(done / 0.1 + 0.01, (1 - done) / 0.9, 1.0)


def mass_of(q: Tensor, k: Tensor) -> Tensor:
    """The attention that each unit of keys gets: [B, Hq, N, Ukv]."""
    return pooled_attention(q, k, unit_kv=UNIT, mask=P.Causal(), reduce="sum")


def learnt(scores: Tensor, mass: Tensor) -> Tensor:
    """How far a gate's scores are from the attention; gradients reach the gate only."""
    own, unit = own_and_units(scores)
    return distillation_loss(scores, mass, unit <= own)


def grouped(scores: Tensor, kv_heads: int) -> Tensor:
    """What a gate predicts for each query head, averaged over the heads of a key head."""
    own, unit = own_and_units(scores)
    predicted = scores.masked_fill(unit > own, -math.inf).softmax(-1)
    return predicted.unflatten(1, (kv_heads, -1)).mean(2)


def scorer(gate: nn.Module) -> Scorer:
    """A gate as a scorer of the comparison."""
    return lambda q, k: grouped(gate(q, k), k.shape[1])


@dataclass
class Seen:
    """What the layers of a forward pass had to say."""

    divergence: list[Tensor] = field(default_factory=list)
    missed: list[Tensor] = field(default_factory=list)


def under_selection(
    gate: nn.Module, most: int, seen: Seen, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Attention to the ``most`` units that the gate selects, with what else the losses need.

    The dense weights, left alone where selected and divided by their sum there, are the weights of
    attention to the selected keys, and so are the gradients.
    """
    heads = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(heads, 1) for t in (k, v))
    score = q * q.shape[-1] ** -0.5 @ keys.mT
    later = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weight = score.masked_fill(later, -math.inf).softmax(-1, dtype=torch.float32)
    weight = weight.unflatten(-1, (-1, UNIT))
    mass = weight.sum(-1)
    with torch.autocast(q.device.type, enabled=False):
        scores = gate(q.detach().float(), k.detach().float())
    seen.divergence.append(learnt(scores, mass))
    units = chosen(grouped(scores.detach(), k.shape[1]), most).repeat_interleave(heads, 1)
    recall = (mass * units).sum(-1)
    seen.missed.append(1 - recall.mean())
    kept = (weight * units[..., None]).flatten(-2)
    return (kept @ values) / recall.clamp_min(1e-6)[..., None]


@dataclass
class Steering:
    """The weight of what is missed, so that in the end no more than ``wanted`` is.

    Until half of the tuning is done it leads from what was missed at first to what is wanted: a
    model that is hurried gives up what it cannot learn again.
    """

    wanted: float
    weight: Tensor
    first: Tensor | None = None

    def next(self, missed: Tensor, done: float) -> Tensor:
        """The weight to use now, at most 2 % more or less than the last; no more than 1."""
        self.first = missed.detach() if self.first is None else self.first
        now = self.wanted + (self.first - self.wanted).clamp_min(0) * max(1 - 2 * done, 0)
        push = (missed.detach() / now - 1).clamp(-0.1, 0.1)
        self.weight = (self.weight * (0.2 * push).exp()).clamp(1e-3, 1.0)
        return self.weight


def tune(
    model: SmallLM,
    made: nn.ModuleList,
    text: Text,
    gates: GateConfig,
    most: int,
    say: Callable[[str], None],
    seconds: float = math.inf,
    seed: int = 0,
) -> tuple[SmallLM, nn.ModuleList]:
    """Copies of the model and of its gates, trained on under the selection."""
    model, made = copy.deepcopy(model).train(), copy.deepcopy(made)
    rate = gates.tuning_rate
    optimisers = optimiser_of(model, rate, model.config.decay), optimiser_of(made, rate, 0.0)
    batches = text.batches(model.config, gates.tuning_steps, seed)
    steering = Steering(1 - gates.aim, torch.full((), 0.1, device=text.train.device))
    for done, rows in zip(progress(gates.tuning_steps, seconds), batches, strict=False):
        seen = Seen()
        attend = [partial(under_selection, gate, most, seen) for gate in made]
        with attending(model, attend), autocast(rows.device):
            loss = model.loss(rows)
        missed = torch.stack(seen.missed).mean()
        weight, left = steering.next(missed, done), 1 - done
        total = loss + weight * missed + torch.stack(seen.divergence).sum()
        stepped(total, (optimisers[0], left * rate), (optimisers[1], left * gates.rate / 3))
        if model.steps % 50 == 0:
            divergence = torch.stack(seen.divergence).mean().item()
            say(
                f"tuning, step {model.steps}: {loss.item():.3f} nats per token, "
                f"missed {missed.item():.3f} at a weight of {weight.item():.2f}, "
                f"divergence {divergence:.3f}"
            )
        model.steps += 1
    return model.eval(), made

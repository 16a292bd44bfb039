"""Train a gate for a small language model, and compare what it selects with what others select.

A model is trained from scratch on text (see :mod:`benchmarks.small_lm`) and frozen. A
:class:`PooledGate` for each layer learns its attention maps, from the text that the model was
trained on. On held-out text every scorer then selects, for each token and key head, a share of the
units of 16 keys that the token sees, its own unit among them. Measured are the share of the
attention that the selected keys had (recall), and the loss of the model when it attends to nothing
else.

    python -m benchmarks.train_gate --out train_gate.json --plot train_gate.svg
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import write_json
from benchmarks.gate_scorers import UNIT, UNTRAINED, Chosen, Scorer, choose, oracle
from benchmarks.small_lm import Config, SmallLM, Text, causal, read_text, train
from sparse_compile import patterns as P
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.selected_ops import SELECTED_ATTENTION
from sparse_compile.selected_spec import SelectedSpec
from sparse_compile.selection import (
    PooledGate,
    allowed_units,
    distillation_loss,
    pooled_attention,
)

SPEC = SelectedSpec(MaskExpr(KV <= Q), 1, UNIT).text
RATIOS = (0.05, 0.10, 0.15, 0.20, 0.25)
#: Where the model's loss is compared.
AIM = 0.15
TRAINED = "trained gate"


@dataclass(frozen=True)
class GateConfig:
    """Sizes of the gates, of their training and of the comparison."""

    width: int = 64
    rope: int = 32
    parts: int = 4
    batch: int = 1
    steps: int = 600
    rate: float = 3e-3
    held_out_rows: int = 24


@contextmanager
def attending(model: SmallLM, by_layer: list[Callable[..., Tensor]]) -> Iterator[None]:
    """The layers attend by these functions of q, k and v."""
    for layer, attend in zip(model.attentions, by_layer, strict=True):
        layer.attend = attend
    yield
    for layer in model.attentions:
        layer.attend = causal


def queries_and_keys(model: SmallLM, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What the attention of each layer sees, without gradient."""
    seen = []

    def watch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q, k))
        return causal(q, k, v)

    with torch.no_grad(), attending(model, [watch] * len(model.attentions)):
        model(tokens)
    return seen


def distil(
    model: SmallLM, text: Text, config: Config, gates: GateConfig, say: Callable[[str], None]
) -> nn.ModuleList:
    """A gate for each layer that has learned the attention maps of the frozen model."""
    torch.manual_seed(1)
    made = nn.ModuleList(
        PooledGate(
            *(config.head_dim, config.heads, config.kv_heads),
            lists=config.heads,
            unit_kv=UNIT,
            width=gates.width,
            rope=gates.rope,
            parts=gates.parts,
        )
        for _ in model.attentions
    )
    optimiser = torch.optim.Adam(made.parameters(), lr=gates.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, gates.rate, total_steps=max(gates.steps, 2), pct_start=0.1
    )
    units = {"unit_kv": UNIT, "mask": P.Causal(), "lists": config.heads}
    batch = replace(config, batch=gates.batch)
    for step, rows in enumerate(text.batches(batch, gates.steps, seed=2)):
        losses = []
        for gate, (q, k) in zip(made, queries_and_keys(model, rows[:, :-1]), strict=True):
            target = pooled_attention(q, k, reduce="sum", **units)
            losses.append(distillation_loss(gate(q, k), target, allowed_units(q, k, **units)))
        optimiser.zero_grad()
        torch.stack(losses).sum().backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0 or step == gates.steps - 1:
            by_layer = ", ".join(f"{loss.item():.3f}" for loss in losses)
            say(f"gates, step {step}: divergence by layer {by_layer}")
    return made.requires_grad_(False)


def scorers_of(gates: nn.ModuleList) -> dict[str, list[Scorer]]:
    """The scorer of each layer, by name."""
    layers = len(gates)
    same = {name: [scorer] * layers for name, scorer in {"oracle": oracle, **UNTRAINED}.items()}
    return {TRAINED: [functools.partial(shared, gate) for gate in gates], **same}


def shared(gate: PooledGate, q: Tensor, k: Tensor) -> Tensor:
    """What a gate predicts for each query head, averaged over the heads of a key head."""
    allowed = allowed_units(q, k, unit_kv=UNIT, mask=P.Causal())
    predicted = gate(q, k).masked_fill(~allowed, -torch.inf).softmax(-1)
    return predicted.unflatten(1, (k.shape[1], -1)).mean(2)


def recall(chosen: Chosen, mass: Tensor) -> Tensor:
    """The mean share of the attention [B, Hq, N, Ukv] that chosen units have."""
    heads = mass.shape[1] // chosen.units.shape[1]
    return (mass * chosen.units.repeat_interleave(heads, 1)).sum(-1).mean()


def density(chosen: Chosen) -> Tensor:
    """Chosen pairs of tokens among those that a causal mask allows."""
    n, most = chosen.units.shape[2:]
    position = torch.arange(n)[:, None]
    visible = (position + 1 - torch.arange(most) * UNIT).clamp(0, UNIT)
    return (chosen.units * visible).sum() / (visible.sum() * chosen.units.shape[:2].numel())


@torch.no_grad()
def compare_recall(
    model: SmallLM, rows: Tensor, scorers: dict[str, list[Scorer]]
) -> list[dict[str, Any]]:
    """Recall and density of all scorers, averaged over held-out rows and over layers."""
    found: dict[tuple[str, float], list[Tensor]] = {}
    for row in rows:
        for layer, (q, k) in enumerate(queries_and_keys(model, row[None, :-1])):
            mass = pooled_attention(q, k, unit_kv=UNIT, mask=P.Causal(), reduce="sum")
            for name, by_layer in scorers.items():
                scores = by_layer[layer](q, k)
                for ratio in RATIOS:
                    chosen = choose(scores, ratio)
                    pair = torch.stack([recall(chosen, mass), density(chosen)])
                    found.setdefault((name, ratio), []).append(pair)
    results = []
    for (name, ratio), pairs in found.items():
        all_pairs = torch.stack(pairs).view(len(rows), -1, 2)
        mean = all_pairs.mean((0, 1)).tolist()
        by_layer = all_pairs[..., 0].mean(0).tolist()
        results.append(
            {"scorer": name, "ratio": ratio, "recall": mean[0], "density": mean[1]}
            | {"recall_by_layer": by_layer}
        )
    return results


def selected(scorer: Scorer, ratio: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to the chosen units only, by this library's operator."""
    lists = choose(scorer(q, k), ratio).lists
    operands = q, k, v, lists.index, lists.count
    return SELECTED_ATTENTION(*operands, [], [], q.shape[-1] ** -0.5, SPEC)[0]


@torch.no_grad()
def mean_loss(model: SmallLM, rows: Tensor, by_layer: list[Callable[..., Tensor]]) -> float:
    """Nats per held-out token."""
    with attending(model, by_layer):
        return sum(model.loss(row[None]).item() for row in rows) / len(rows)


def compare_losses(
    model: SmallLM, rows: Tensor, scorers: dict[str, list[Scorer]], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Losses of the model: dense, with the trained gate, and with the others where aimed at."""
    dense = mean_loss(model, rows, [causal] * len(model.attentions))
    results = [{"scorer": "dense", "ratio": 1.0, "loss": dense, "above_dense": 0.0}]
    for name, by_layer in scorers.items():
        for ratio in RATIOS if name == TRAINED else (AIM,):
            attend = [functools.partial(selected, scorer, ratio) for scorer in by_layer]
            loss = mean_loss(model, rows, attend)
            above = loss / dense - 1
            results.append({"scorer": name, "ratio": ratio, "loss": loss, "above_dense": above})
            say(f"{name} at {ratio:.0%}: {loss:.4f} nats, {above:+.2%} of {dense:.4f}")
    return results


def language_model(
    config: Config, text: Text, say: Callable[[str], None], kept: Path | None
) -> SmallLM:
    """The model in the file ``kept``, if there is such a file; else a new one, kept there."""
    if kept is not None and kept.exists():
        model = SmallLM(config)
        model.load_state_dict(torch.load(kept, weights_only=True))
        return model.eval().requires_grad_(False)
    model = train(config, text, say)
    if kept is not None:
        torch.save(model.state_dict(), kept)
    return model


def compare(
    config: Config, gates: GateConfig, say: Callable[[str], None] = print, kept: Path | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train, distil and measure: the recalls, and what else to report."""
    text = read_text(config)
    model = language_model(config, text, say, kept)
    scorers = scorers_of(distil(model, text, config, gates, say))
    rows = text.held_out_rows(config, gates.held_out_rows)
    recalls = compare_recall(model, rows, scorers)
    for name in scorers:
        line = [row["recall"] for row in recalls if row["scorer"] == name]
        say(f"{name:34}" + "".join(f"{value:8.1%}" for value in line))
    described = {"sha256": text.sha256, "tokens": text.train.numel()}
    described["held_out_tokens"] = rows[:, 1:].numel()
    losses = compare_losses(model, rows, scorers, say)
    settings = {"model": asdict(config), "gates": asdict(gates), "unit_kv": UNIT}
    return recalls, {"config": settings, "text": described, "losses": losses}


def plot(recalls: list[dict[str, Any]], path: Path) -> None:
    """Recall against density; the same bytes for the same numbers."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    shown = ["oracle", TRAINED, *(name for name in UNTRAINED if not name.endswith("local"))]
    shown += ["overlapping pool, sink and local", "sink and local", "local"]
    settings = {"svg.fonttype": "none", "svg.hashsalt": "recall"}  # text stays text
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
        for name in shown:
            own = [row for row in recalls if row["scorer"] == name]
            across, up = ([100 * row[key] for row in own] for key in ("density", "recall"))
            style = "--" if name == "oracle" else "-"
            axes.plot(across, up, style, marker=".", lw=3 if name == TRAINED else 1.2, label=name)
        axes.set(xlabel="selected keys, % of those before the token", ylabel="recall, %")
        axes.set_title("Attention that the selected keys have, on held-out text", loc="left")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right center", frameon=False)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=Config.steps, help="of the language model")
    parser.add_argument("--gate-steps", type=int, default=GateConfig.steps)
    parser.add_argument("--model", type=Path, help="file that keeps the trained language model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("train_gate.json"))
    parser.add_argument("--plot", type=Path, default=Path("train_gate.svg"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config, gates = Config(steps=args.steps), GateConfig(steps=args.gate_steps)
    recalls, extra = compare(config, gates, functools.partial(print, flush=True), args.model)
    write_json(args.out, recalls, **extra)
    plot(recalls, args.plot)


if __name__ == "__main__":
    main()

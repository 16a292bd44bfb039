"""Train a gate for a small language model, tune the model under it, and compare with others.

A model is trained from scratch on text (see :mod:`benchmarks.small_lm`). A :class:`PooledGate` for
each layer learns its attention maps. Then the model is tuned under the selection of its gates (see
:mod:`benchmarks.gate_tuning`); beside it, the same model goes on training densely for as many
steps, on as much text. On held-out text every scorer selects, for each token and key head, the same
number of units of 16 keys, the token's own among them. Measured are the share of the attention that
the selected keys have (recall), before tuning and after; and the loss of the model when it attends
to nothing else, against the model that went on densely.

    python -m benchmarks.train_gate --device cuda --minutes 4.5

``--quick`` does everything with a model that learns little, in about two minutes on a CPU.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import write_json
from benchmarks.gate_measures import AIM, TRAINED, Scorers, compare_losses, compare_recall, losses
from benchmarks.gate_report import plot, tables
from benchmarks.gate_scorers import UNIT, UNTRAINED, most_units, oracle
from benchmarks.gate_tuning import GateConfig, distil, scorer, tune
from benchmarks.small_lm import Config, SmallLM, Text, read_text, train, trained_on

#: Of the time that is left when a phase begins.
SHARES = {"train": 0.36, "distil": 0.1, "tune": 0.58}


@dataclass(frozen=True)
class Settings:
    """What a run is made of."""

    model: Config
    gates: GateConfig
    seed: int = 0


#: A minute or two on a CPU; a few minutes on an H200, where time ends the phases.
PRESETS = {
    "quick": Settings(
        Config(context=512, steps=100, batch=2, vocabulary=512, most_bytes=1_000_000),
        GateConfig(steps=40, tuning_steps=40, held_out_rows=8),
    ),
    "cpu": Settings(Config(), GateConfig()),
    "cuda": Settings(
        Config(
            *(6, 6, 6, 64),
            vocabulary=4096,
            context=2048,
            batch=16,
            steps=100_000,
            rate=1.5e-3,
            most_bytes=100_000_000,
            packages=("torch",),  # the standard library alone would be learnt by heart
        ),
        GateConfig(
            *(48, 16, 16),  # each key is scored on its own, in 48 channels, as DSA's indexer does
            batch=4,
            steps=100_000,
            tuning_steps=100_000,
            held_out_rows=32,
        ),
    ),
}


@dataclass(frozen=True)
class Clock:
    """Seconds until the end, and shares of what is left."""

    end: float

    def share(self, phase: str) -> float:
        return max((self.end - time.monotonic()) * SHARES[phase], 1.0)


def all_scorers(gates: nn.ModuleList) -> Scorers:
    same = {name: [by] * len(gates) for name, by in {"oracle": oracle, **UNTRAINED}.items()}
    return {TRAINED: [scorer(gate) for gate in gates], **same}


@dataclass
class Results:
    """What was found so far, told and written as it comes."""

    path: Path
    about: dict[str, Any]
    say: Callable[[str], None] = print
    recalls: list[dict[str, Any]] = field(default_factory=list)
    losses: list[dict[str, Any]] = field(default_factory=list)

    def write(self) -> None:
        write_json(self.path, self.recalls, **self.about, losses=self.losses)


def run(settings: Settings, text: Text, clock: Clock, results: Results) -> None:
    """Train, distil, measure; tune, and train densely for as long; measure again."""
    model, gates, seed, say = settings.model, settings.gates, settings.seed, results.say
    rows = text.held_out_rows(model, gates.held_out_rows)
    most, after = most_units(AIM, model.context), 1000 * seed + 3
    frozen = train(model, text, say, clock.share("train"), seed)
    made = distil(frozen, text, gates, say, clock.share("distil"), seed)
    measure("frozen", frozen, made, rows, losses(frozen, rows), seed, results)
    tuned, followed = tune(frozen, made, text, gates, most, say, clock.share("tune"), after)
    steps = tuned.steps - frozen.steps
    dense = trained_on(frozen, text, steps, gates.tuning_rate, say, after)
    baseline = losses(dense, rows)
    say(f"dense for as long, {steps} steps: {baseline.mean().item():.4f} nats")
    measure("tuned", tuned, followed, rows, baseline, seed, results)


def measure(
    name: str,
    model: SmallLM,
    gates: nn.ModuleList,
    rows: Tensor,
    dense: Tensor,
    seed: int,
    results: Results,
) -> None:
    """Recall and losses of a model, against the losses [rows] of a dense one."""
    scorers, about = all_scorers(gates), {"seed": seed, "model": name}
    found = [about | row for row in compare_recall(model, rows, scorers)]
    for who in scorers:
        line = [row["recall"] for row in found if row["scorer"] == who]
        results.say(f"{name:8}{who:34}" + "".join(f"{value:8.1%}" for value in line))
    results.recalls += found
    results.write()
    baseline = {"scorer": "dense baseline", "loss": dense.mean().item()}
    results.losses.append(about | baseline | {"steps": model.steps})
    for row in compare_losses(name, model, rows, scorers, dense, results.say):
        results.losses.append(about | row)
        results.write()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that all works")
    parser.add_argument("--minutes", type=float, help="end about then; steps are as many as fit")
    parser.add_argument("--seeds", type=int, default=1, help="runs, which share the minutes")
    parser.add_argument("--steps", type=int, help="of the language model")
    parser.add_argument("--gate-steps", type=int)
    parser.add_argument("--tuning-steps", type=int)
    parser.add_argument("--parts", type=int, help="of a unit, which a gate pools on their own")
    parser.add_argument("--width", type=int, help="channels of a gate")
    parser.add_argument("--aim", type=float, help="recall that tuning aims at")
    parser.add_argument("--packages", nargs="*", help="also learn from these installed packages")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("train_gate.json"))
    parser.add_argument("--plot", type=Path, help="draw the recalls here; takes matplotlib")
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> Settings:
    preset = PRESETS["quick" if args.quick else args.device]
    model = {"steps": args.steps, "packages": args.packages and tuple(args.packages)}
    gates = {"steps": args.gate_steps, "tuning_steps": args.tuning_steps, "aim": args.aim}
    gates |= {"parts": args.parts, "width": args.width}
    given = [{k: v for k, v in part.items() if v is not None} for part in (model, gates)]
    return Settings(replace(preset.model, **given[0]), replace(preset.gates, **given[1]))


def main() -> None:
    args = arguments()
    start = time.monotonic()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    settings = settings_of(args)

    def say(line: str) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {line}", flush=True)

    text = read_text(settings.model).to(torch.device(args.device))
    about = {"sha256": text.sha256, "tokens": text.train.numel()}
    about["held_out_tokens"] = settings.gates.held_out_rows * settings.model.context
    say(f"text of {about['tokens']} tokens")
    config = {"model": asdict(settings.model), "gates": asdict(settings.gates), "unit_kv": UNIT}
    results = Results(args.out, {"config": config, "text": about}, say)
    total = math.inf if args.minutes is None else 60 * args.minutes - (time.monotonic() - start)
    for seed in range(args.seeds):
        end = start + (seed + 1) / args.seeds * total
        run(replace(settings, seed=seed), text, Clock(end), results)
    print(tables({"rows": results.recalls, "losses": results.losses}))
    if args.plot is not None:
        plot(results.recalls, args.plot)


if __name__ == "__main__":
    main()

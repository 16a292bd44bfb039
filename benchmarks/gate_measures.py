"""What is measured of a model and of its scorers, on held-out text: recall, and loss.

Recall is the share of the attention that the selected keys have, of the dense attention of the
model. The loss is that of the model when it attends to nothing else, by this library's operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gate_scorers import UNIT, Scorer, choose, density, most_units, ranked
from benchmarks.gate_tuning import attending, mass_of, queries_and_keys
from benchmarks.small_lm import Attend, SmallLM, autocast, causal
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.ops.selected import SELECTED_ATTENTION
from sparse_compile.spec.selected import SelectedSpec

SPEC = SelectedSpec(MaskExpr(KV <= Q), 1, UNIT).text
RATIOS = (0.05, 0.10, 0.15, 0.20, 0.25)
#: Where the model is tuned, and its loss compared.
AIM = 0.15
TRAINED = "trained gate"
#: The scorers of each layer, by name.
Scorers = dict[str, list[Scorer]]
#: Held-out rows that are looked at together.
TOGETHER = 4


def recall(scores: Tensor, mass: Tensor, budgets: list[int]) -> Tensor:
    """The mean share of the attention [B, Hq, N, Ukv] that the best units have, by budget."""
    by_list = mass.unflatten(1, (scores.shape[1], -1)).mean(2)
    got = by_list.gather(-1, ranked(scores)).cumsum(-1)
    return got[..., [most - 1 for most in budgets]].mean((0, 1, 2))


@torch.no_grad()
def compare_recall(model: SmallLM, rows: Tensor, scorers: Scorers) -> list[dict[str, Any]]:
    """Recall and density of all scorers, averaged over held-out rows and over layers."""
    context = model.config.context
    budgets = [most_units(ratio, context) for ratio in RATIOS]
    found: dict[str, list[Tensor]] = {name: [] for name in scorers}
    shares = []
    for some in rows.split(TOGETHER):
        shares.append(len(some) / len(rows))
        for layer, (q, k) in enumerate(queries_and_keys(model, some[:, :-1])):
            mass = mass_of(q, k)
            for name, by_layer in scorers.items():
                found[name].append(recall(by_layer[layer](q, k), mass, budgets))
    results = []
    for name, values in found.items():
        by_rows = torch.stack(values).unflatten(0, (len(shares), -1)).cpu()
        by_layer = (by_rows * torch.tensor(shares)[:, None, None]).sum(0)  # [layers, ratios]
        for i, (ratio, most) in enumerate(zip(RATIOS, budgets, strict=True)):
            results.append(
                {"scorer": name, "ratio": ratio, "units": most, "density": density(most, context)}
                | {"recall": by_layer[:, i].mean().item()}
                | {"recall_by_layer": by_layer[:, i].tolist()}
            )
    return results


def selected(scorer: Scorer, most: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to the chosen units only, by this library's operator."""
    with torch.autocast(q.device.type, enabled=False):
        lists = choose(scorer(q.float(), k.float()), most)
    operands = (t.to(v.dtype) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5
    return SELECTED_ATTENTION(*operands, lists.index, lists.count, [], [], scale, SPEC)[0]


@torch.no_grad()
def losses(model: SmallLM, rows: Tensor, by_layer: list[Attend] | None = None) -> Tensor:
    """Nats per held-out token of each row; densely, unless the layers attend otherwise."""
    by_layer = by_layer or [causal] * len(model.attentions)
    with attending(model, by_layer), autocast(rows.device):
        return torch.cat([model.losses(some).float() for some in rows.split(TOGETHER)]).cpu()


def compare_losses(
    name: str,
    model: SmallLM,
    rows: Tensor,
    scorers: Scorers,
    dense: Tensor,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """The losses of a model with all scorers where aimed at, above those of a dense model.

    Args:
        name: of the model.
        dense: the losses [rows] to compare with.
    """
    most = most_units(AIM, model.config.context)
    cases: dict[str, list[Attend] | None] = {"dense": None}
    for who, by_layer in scorers.items():
        cases[who] = [partial(selected, scorer, most) for scorer in by_layer]
    for who, attend in cases.items():
        found = losses(model, rows, attend)
        mean, above = found.mean().item(), (found - dense) / dense.mean()
        error = above.std().item() / math.sqrt(len(rows))
        say(f"{name}, {who}: {mean:.4f} nats, {above.mean().item():+.2%} (+- {error:.2%})")
        yield (
            {"model": name, "scorer": who, "units": None if who == "dense" else most}
            | {"loss": mean, "above_dense": above.mean().item(), "standard_error": error}
        )

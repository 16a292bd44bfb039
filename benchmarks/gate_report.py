"""The tables of a comparison of gates, in Markdown, from its JSON file.

python -m benchmarks.gate_table benchmarks/results/train_gate.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.gate_measures import TRAINED
from benchmarks.gate_scorers import UNTRAINED

#: Rows of a file, see :mod:`benchmarks.train_gate`.
Rows = list[dict[str, Any]]


def tables(found: dict[str, Any]) -> str:
    """A table for each model: recalls by the share of pairs selected, and losses."""
    models = dict.fromkeys(row["model"] for row in found["rows"])
    return "\n\n".join(table(model, found["rows"], found["losses"]) for model in models)


def table(model: str, rows: Rows, losses: Rows) -> str:
    """One model, all scorers, means over seeds; the best recall first."""
    recalls, shares = by_scorer(model, rows), densities(rows)
    lost = {who: mean(values) for who, values in loss_by_scorer(model, losses).items()}
    dense = lost["dense baseline"]
    lines = [
        f"{model} model, dense baseline {dense:.4f} nats",
        "",
        "| scorer | " + " | ".join(f"{value:.1%}" for value in shares) + " | loss |",
        "| --- |" + " --- |" * (len(shares) + 1),
    ]
    for who in sorted(recalls, key=lambda who: -mean(recalls[who])):
        cells = [f"{value:.1%}" for value in recalls[who]]
        cells.append(f"{lost[who] / dense - 1:+.2%}" if who in lost else "")
        lines.append(f"| {who} | " + " | ".join(cells) + " |")
    if "dense" in lost:
        lines += ["", f"attending densely: {lost['dense'] / dense - 1:+.2%}"]
    return "\n".join(lines)


def densities(rows: Rows) -> list[float]:
    """The shares of pairs that are selected, in the order of the ratios."""
    return list({row["ratio"]: row["density"] for row in rows}.values())


def by_scorer(model: str, rows: Rows) -> dict[str, list[float]]:
    """The mean recall of each scorer at each ratio."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row["model"] == model:
            found.setdefault(row["scorer"], {}).setdefault(row["ratio"], []).append(row["recall"])
    return {who: [mean(values) for values in ratios.values()] for who, ratios in found.items()}


def loss_by_scorer(model: str, losses: Rows) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in losses:
        if row["model"] == model:
            found.setdefault(row["scorer"], []).append(row["loss"])
    return found


def plot(rows: Rows, path: Path) -> None:
    """Recall against density, a panel for each model; the same bytes for the same numbers."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    shown = ["oracle", TRAINED, *UNTRAINED]
    models, across = list(dict.fromkeys(row["model"] for row in rows)), densities(rows)
    across = [100 * value for value in across]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "recall"}):  # text is text
        figure, panels = pyplot.subplots(
            *(1, len(models)),
            **{"figsize": (3 + 4.5 * len(models), 5), "sharey": True, "layout": "constrained"},
            squeeze=False,
        )
        for model, axes in zip(models, panels[0], strict=True):
            recalls = by_scorer(model, rows)
            for name in shown:
                width, style = (3 if name == TRAINED else 1.2), "--" if name == "oracle" else "-"
                up = [100 * value for value in recalls[name]]
                (line,) = axes.plot(across, up, style, marker=".", lw=width)
                if model == models[0]:
                    line.set_label(name)
            axes.set_title(f"{model} model", loc="left")
            axes.set(xlabel="selected keys, % of those before the token")
            axes.grid(alpha=0.3)
        panels[0][0].set(ylabel="recall, %")
        figure.suptitle("Attention that the selected keys have, on held-out text")
        figure.legend(loc="outside right center", frameon=False)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    content = json.loads(Path(sys.argv[1]).read_text())
    print(tables(content))
    for drawn in sys.argv[2:]:
        plot(content["rows"], Path(drawn))

"""Scoring: from a scorer, a value, to what computes its scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparse_compile.patterns.scorers import (
    Antidiagonal,
    Compressed,
    Gate,
    Indexer,
    MeanPool,
    MinMax,
    OverlapPool,
)
from sparse_compile.selection.masses import by_antidiagonals, by_compressed, by_windows
from sparse_compile.selection.pooled import by_bounds, by_mean
from sparse_compile.selection.scores import by_gate, by_indexer
from sparse_compile.selection.task import Scoring, Task

_MAKERS: dict[type, Callable[[Any, Task], Scoring]] = {
    Antidiagonal: by_antidiagonals,
    Compressed: by_compressed,
    Gate: by_gate,
    Indexer: by_indexer,
    MeanPool: by_mean,
    MinMax: by_bounds,
    OverlapPool: by_windows,
}


def scoring(scorer: Any, task: Task) -> Scoring:
    """The scores that ``scorer`` gives, prepared to be computed some units at a time."""
    return _MAKERS[type(scorer)](scorer, task)

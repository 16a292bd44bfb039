"""Predicates over attention coordinates: nodes, folding, text, evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparse_compile.expr.fold import Algebra, UnsupportedNode, fold
from sparse_compile.expr.mask_expr import MaskExpr
from sparse_compile.expr.nodes import (
    COORDINATES,
    KV,
    N_KV,
    N_Q,
    WORD,
    B,
    Bit,
    FloorDiv,
    FloorMod,
    H,
    Q,
    dense_bit,
    is_table,
    renumbered,
    size_symbol,
    table,
    table_index,
)
from sparse_compile.expr.text import from_text, to_text

if TYPE_CHECKING:
    from sparse_compile.expr.evaluation import evaluate

__all__ = [
    "COORDINATES",
    "KV",
    "N_KV",
    "N_Q",
    "WORD",
    "Algebra",
    "B",
    "Bit",
    "FloorDiv",
    "FloorMod",
    "H",
    "MaskExpr",
    "Q",
    "UnsupportedNode",
    "dense_bit",
    "evaluate",
    "fold",
    "from_text",
    "is_table",
    "renumbered",
    "size_symbol",
    "table",
    "table_index",
    "to_text",
]


def __getattr__(name: str) -> Any:
    # Evaluation needs torch; predicates, and the patterns made of them, do not.
    if name != "evaluate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sparse_compile.expr.evaluation import evaluate

    return evaluate

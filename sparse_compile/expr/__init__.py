"""Predicates and score programs over attention coordinates: nodes, folding, text, evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparse_compile.expr.dropout import Dropout
from sparse_compile.expr.fold import Algebra, UnsupportedNode, fold, fold_real
from sparse_compile.expr.mask_expr import MaskExpr
from sparse_compile.expr.nodes import (
    COORDINATES,
    KV,
    N_KV,
    N_Q,
    SCORE,
    WORD,
    B,
    Bit,
    FloorDiv,
    FloorMod,
    H,
    Q,
    dense_bit,
    is_learned,
    is_lookup,
    is_table,
    learned,
    renumbered,
    size_symbol,
    table,
    table_index,
)
from sparse_compile.expr.score import ScoreProgram, softcap
from sparse_compile.expr.text import from_text, to_text

if TYPE_CHECKING:
    from sparse_compile.expr.evaluation import (
        ScoreData,
        add_learned_gradients,
        evaluate,
        evaluate_lookup,
        evaluate_score,
        evaluate_slope,
        grid,
        indices_at,
        keeps,
    )

__all__ = [
    "COORDINATES",
    "KV",
    "N_KV",
    "N_Q",
    "SCORE",
    "WORD",
    "Algebra",
    "B",
    "Bit",
    "Dropout",
    "FloorDiv",
    "FloorMod",
    "H",
    "MaskExpr",
    "Q",
    "ScoreData",
    "ScoreProgram",
    "UnsupportedNode",
    "add_learned_gradients",
    "dense_bit",
    "evaluate",
    "evaluate_lookup",
    "evaluate_score",
    "evaluate_slope",
    "fold",
    "fold_real",
    "from_text",
    "grid",
    "indices_at",
    "is_learned",
    "is_lookup",
    "is_table",
    "keeps",
    "learned",
    "renumbered",
    "size_symbol",
    "softcap",
    "table",
    "table_index",
    "to_text",
]


_EVALUATION = frozenset(
    "ScoreData add_learned_gradients evaluate evaluate_lookup evaluate_score evaluate_slope grid "
    "indices_at keeps".split()
)


def __getattr__(name: str) -> Any:
    # Evaluation needs torch; predicates, and the patterns made of them, do not.
    if name not in _EVALUATION:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sparse_compile.expr import evaluation

    return getattr(evaluation, name)

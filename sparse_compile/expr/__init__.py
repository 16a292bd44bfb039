"""Predicates over attention coordinates: nodes, folding, text, evaluation."""

from sparse_compile.expr.evaluate import evaluate
from sparse_compile.expr.fold import Algebra, UnsupportedNode, fold
from sparse_compile.expr.mask_expr import MaskExpr
from sparse_compile.expr.nodes import (
    COORDINATES,
    KV,
    N_KV,
    N_Q,
    B,
    FloorDiv,
    FloorMod,
    H,
    Q,
    is_table,
    size_symbol,
    table,
    table_index,
)
from sparse_compile.expr.text import from_text, to_text

__all__ = [
    "COORDINATES",
    "KV",
    "N_KV",
    "N_Q",
    "Algebra",
    "B",
    "FloorDiv",
    "FloorMod",
    "H",
    "MaskExpr",
    "Q",
    "UnsupportedNode",
    "evaluate",
    "fold",
    "from_text",
    "is_table",
    "size_symbol",
    "table",
    "table_index",
    "to_text",
]

"""Learned and content-dependent masks: which keys are selected, and by what rule."""

from sparse_compile.selection.select import checked_select
from sparse_compile.selection.selection import Selection, SelectionReport, canonical, check_lists
from sparse_compile.selection.train.distill import (
    allowed_units,
    distillation_loss,
    pooled_attention,
)
from sparse_compile.selection.train.gate import PooledGate
from sparse_compile.selection.train.soft_gate import gated_attention

__all__ = [
    "PooledGate",
    "Selection",
    "SelectionReport",
    "allowed_units",
    "canonical",
    "check_lists",
    "checked_select",
    "distillation_loss",
    "gated_attention",
    "pooled_attention",
]

"""Learned and content-dependent masks: which keys are selected, and by what rule."""

from sparse_compile.selection.distill import distillation_loss
from sparse_compile.selection.gate import PooledGate
from sparse_compile.selection.pooled_map import allowed_units, pooled_attention
from sparse_compile.selection.selection import Selection, canonical, transposed
from sparse_compile.selection.soft_gate import gated_attention

__all__ = [
    "PooledGate",
    "Selection",
    "allowed_units",
    "canonical",
    "distillation_loss",
    "gated_attention",
    "pooled_attention",
    "transposed",
]

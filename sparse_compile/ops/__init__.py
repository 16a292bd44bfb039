"""The operators that rewritten graphs call, each with a fake; importing this registers them."""

from sparse_compile.ops.attention import ATTENTION, LAYOUT, attention_backward, no_gradient
from sparse_compile.ops.operands import WIDEST, WIDEST_UNITS, check_operands

__all__ = [
    "ATTENTION",
    "LAYOUT",
    "WIDEST",
    "WIDEST_UNITS",
    "attention_backward",
    "check_operands",
    "no_gradient",
]

"""The operators that rewritten graphs call, each with a fake.

Importing this registers them, and hands their kernels to layouts and selections.
"""

from sparse_compile.ops.attention import ATTENTION, LAYOUT, attention_backward, no_gradient
from sparse_compile.ops.builders import hand_in
from sparse_compile.ops.operands import WIDEST, WIDEST_UNITS, check_operands

hand_in()

__all__ = [
    "ATTENTION",
    "LAYOUT",
    "WIDEST",
    "WIDEST_UNITS",
    "attention_backward",
    "check_operands",
    "no_gradient",
]

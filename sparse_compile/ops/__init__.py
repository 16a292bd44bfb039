"""The operators that rewritten graphs call, each with a fake; importing this registers them."""

from sparse_compile.ops.attention import (
    ATTENTION,
    BLOCK_LAYOUT,
    DENSE_LAYOUT,
    WIDEST,
    attention_backward,
    check_operands,
    layout_of,
    no_gradient,
)

__all__ = [
    "ATTENTION",
    "BLOCK_LAYOUT",
    "DENSE_LAYOUT",
    "WIDEST",
    "attention_backward",
    "check_operands",
    "layout_of",
    "no_gradient",
]

"""What determines the generated code: masks in their orders, and the specs of kernels."""

from sparse_compile.spec.attention import AttentionSpec, EmptyRows, KernelSpec, are_blocks
from sparse_compile.spec.view import Order, Units, View, natural

__all__ = [
    "AttentionSpec",
    "EmptyRows",
    "KernelSpec",
    "Order",
    "Units",
    "View",
    "are_blocks",
    "natural",
]

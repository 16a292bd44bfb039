"""What determines the generated code: masks in their orders, and the specs of kernels."""

from sparse_compile.spec.attention import AttentionSpec, EmptyRows, KernelSpec
from sparse_compile.spec.view import Order, View, natural

__all__ = ["AttentionSpec", "EmptyRows", "KernelSpec", "Order", "View", "natural"]

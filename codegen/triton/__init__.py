"""Triton kernels generated from a KernelSpec."""

from sparse_compile.codegen.entry import Resources
from sparse_compile.codegen.triton.aot import compile_ahead_of_time
from sparse_compile.codegen.triton.blocks.source import kernel_path, kernel_source

__all__ = ["Resources", "compile_ahead_of_time", "kernel_path", "kernel_source"]

"""The generator of plain Triton kernels, for every GPU and for the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparse_compile.codegen.entry import Kernel
from sparse_compile.codegen.generators import ShapeNeed
from sparse_compile.codegen.triton.blocks.source import kernel_of
from sparse_compile.codegen.triton.selected.source import selected_kernel
from sparse_compile.codegen.triton.selected.spec import SelectedKernelSpec
from sparse_compile.codegen.triton.short.source import short_kernel
from sparse_compile.codegen.triton.short.spec import ShortKernelSpec
from sparse_compile.spec import KernelSpec
from sparse_compile.spec.block_shape import GPU_SHAPES, BlockShape

#: What makes the kernels of a spec, by its type.
_KERNELS: dict[type, Callable[[Any], Kernel]] = {
    KernelSpec: kernel_of,
    SelectedKernelSpec: selected_kernel,
    ShortKernelSpec: short_kernel,
}


class _Triton:
    """See :class:`sparse_compile.codegen.generators.Generator`."""

    name = "triton"

    def refusal(self, spec: Any) -> str:
        """Why not; empty if it can."""
        if type(spec) not in _KERNELS:
            return f"it knows no {type(spec).__name__}"
        known = spec.arch == "interpreter" or spec.arch.startswith("sm_")
        return "" if known else f"Triton has no kernels for {spec.arch}"

    def block_shapes(self, need: ShapeNeed) -> tuple[BlockShape, ...]:
        """Those of its kernels, the default first."""
        return GPU_SHAPES if need.target.kind == "cuda" else ()

    def generate(self, spec: Any) -> Kernel:
        """The kernels of a spec."""
        return _KERNELS[type(spec)](spec)


TRITON = _Triton()

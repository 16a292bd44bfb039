"""The CPU's part of the interface of generators: it runs plain PyTorch, and has block shapes."""

from __future__ import annotations

from typing import Any

from sparse_compile.codegen.entry import Kernel
from sparse_compile.codegen.generators import ShapeNeed
from sparse_compile.spec.block_shape import BlockShape


class _Cpu:
    """See :class:`sparse_compile.codegen.generators.Generator`."""

    name = "cpu"

    def refusal(self, spec: Any) -> str:
        """Why not: what asks for kernels is not the CPU's executor, which needs none."""
        return "it generates no kernels"

    def block_shapes(self, need: ShapeNeed) -> tuple[BlockShape, ...]:
        """The one that its executor is fast in."""
        return (BlockShape(32, 32),) if need.target.kind == "cpu" else ()

    def generate(self, spec: Any) -> Kernel:
        """None: it refuses every spec."""
        raise NotImplementedError(self.refusal(spec))


CPU = _Cpu()

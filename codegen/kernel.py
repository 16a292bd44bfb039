"""What a generator makes, and what it is asked: the interface of ``codegen``.

A decision asks generators for block shapes before views are chosen. They may refuse a spec with a
reason: early, by :meth:`Generator.refusal`, or late, by
:class:`sparse_compile.codegen.runtime.launch.Refused`, where only the compiler can tell that a
kernel spills or needs more shared memory than there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from sparse_compile.codegen.entry import Kernel
from sparse_compile.spec.block_shape import BlockShape
from sparse_compile.spec.target import Target


@dataclass(frozen=True)
class ShapeNeed:
    """What block shapes are asked for.

    Attributes:
        target: where the attention will run.
        head_dim, value_dim: features of q and k, and of v; 0 where they are not known.
        dtype: of the operands; empty where it is not known.
    """

    target: Target
    head_dim: int = 0
    value_dim: int = 0
    dtype: str = ""


class Generator(Protocol):
    """Makes the kernels of a spec."""

    #: As reports call it.
    name: str

    def refusal(self, spec: Any) -> str:
        """Why it cannot make the kernels of a spec; empty if it can."""
        ...

    def block_shapes(self, need: ShapeNeed) -> tuple[BlockShape, ...]:
        """The block shapes that it has kernels for, the default first; none: not for this target.

        Larger blocks never visit fewer pairs.
        """
        ...

    def generate(self, spec: Any) -> Kernel:
        """The kernels of a spec that it does not refuse: same spec, same bytes."""
        ...

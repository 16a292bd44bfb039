"""The generators, as plug-ins: which one makes the kernels of a spec, and which ones refused.

The list below is the one place that names them, as text: each is imported when it is asked first,
so that a machine without Triton runs what needs none.

A decision asks generators for block shapes before views are chosen. They may refuse a spec with a
reason: early, by :meth:`Generator.refusal`, or late, by
:class:`sparse_compile.codegen.runtime.launch.Refused`, where only the compiler can tell that a
kernel spills or needs more shared memory than there is.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from sparse_compile.codegen.entry import Kernel
from sparse_compile.errors import NoKernel
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.spec import AttentionSpec
from sparse_compile.spec.block_shape import BlockShape
from sparse_compile.spec.target import Target

#: In the order in which they are asked; ``:`` stands before the object of the module.
_GENERATORS = (
    "sparse_compile.codegen.gluon.generator:GLUON",
    "sparse_compile.codegen.triton.generator:TRITON",
    "sparse_compile.codegen.cpu.generator:CPU",
)
#: What runs attention to blocks, and to units, by kind of device.
_EXECUTORS = {
    ("blocks", "cuda"): "sparse_compile.codegen.triton.by_length",
    ("blocks", "cpu"): "sparse_compile.codegen.cpu.views",
    ("units", "cuda"): "sparse_compile.codegen.triton.selected.executor",
    ("units", "cpu"): "sparse_compile.codegen.cpu.selected",
}


@dataclass(frozen=True)
class ShapeNeed:
    """What block shapes are asked for.

    Attributes:
        target: where the attention will run.
        head_dim, value_dim: features of q and k, and of v; 0 where they are not known.
        dtype: of the operands; empty where it is not known.
        attention: its mask and what becomes of scores, in blocks of any shape; None: nothing is
            known of them.
        shape: of the problem; None where it is not known.
        trained: whether its gradients will be computed.
    """

    target: Target
    head_dim: int = 0
    value_dim: int = 0
    dtype: str = ""
    attention: AttentionSpec | None = None
    shape: ProblemShape | None = None
    trained: bool = False

    @staticmethod
    def on(device: torch.device | str) -> ShapeNeed:
        """Of anything, on a device or a type of device."""
        return ShapeNeed(Target.of(torch.device(device)))


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


def _loaded(place: str) -> Any:
    module, _, name = place.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


@functools.lru_cache(maxsize=8)
def executor(parts: str, kind: str) -> Any:
    """The executor of attention to ``"blocks"`` or to ``"units"`` on a kind of device."""
    return _loaded(_EXECUTORS[parts, "cuda" if kind == "cuda" else "cpu"])


@dataclass(frozen=True)
class Chosen:
    """The kernels of a spec.

    Attributes:
        kernel: generated.
        generator: name of who made them.
        refused: who refused before that, and why.
    """

    kernel: Kernel
    generator: str
    refused: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Generators:
    """Generators in the order in which they are asked."""

    known: Sequence[Generator]
    _late: dict[Any, dict[str, str]] = field(default_factory=dict)
    _chosen: dict[Any, Chosen] = field(default_factory=dict)

    def choose(self, spec: Any) -> Chosen:
        """The kernels of a spec, by the first generator that does not refuse it.

        Raises:
            NoKernel: all refuse; it says why.
        """
        found = self._chosen.get(spec)
        if found is None:
            found = self._chosen[spec] = self._choose(spec)
        return found

    def _choose(self, spec: Any) -> Chosen:
        late = self._late.get(spec, {})
        refused: list[tuple[str, str]] = []
        for generator in self.known:
            reason = late.get(generator.name) or generator.refusal(spec)
            if not reason:
                return Chosen(generator.generate(spec), generator.name, tuple(refused))
            refused.append((generator.name, reason))
        raise NoKernel(spec.name, refused)

    def refuse(self, spec: Any, reason: str) -> None:
        """From now on, another generator than the one chosen last serves a spec."""
        chosen = self._chosen.pop(spec)
        self._late.setdefault(spec, {})[chosen.generator] = reason

    def block_shapes(self, need: ShapeNeed) -> tuple[BlockShape, ...]:
        """Those of the first generator that has any for a target."""
        return next((shapes for g in self.known if (shapes := g.block_shapes(need))), ())


@functools.lru_cache(maxsize=1)
def generators() -> Generators:
    """All that there are."""
    return Generators([_loaded(place) for place in _GENERATORS])


@functools.lru_cache(maxsize=64)
def block_shapes(device: torch.device | str) -> tuple[BlockShape, ...]:
    """The block shapes to choose from on a device, or a type of device, whatever is computed."""
    return generators().block_shapes(ShapeNeed.on(device))

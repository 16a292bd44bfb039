"""Builders: the kernels that make layouts on a device, as values that are handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sparse_compile.errors import SparseCompileError
from sparse_compile.layout.block_layout import BlockLayout, BlockLists
from sparse_compile.layout.superset import Problem

T = TypeVar("T")


@dataclass(frozen=True)
class ByDevice(Generic[T]):
    """A value for each type of device; :mod:`sparse_compile.ops` fills it when it is imported.

    Attributes:
        purpose: what the values are for, in errors.
    """

    purpose: str
    _given: dict[str, T] = field(default_factory=dict)

    def give(self, device_type: str, value: T) -> None:
        """Use ``value`` on devices of a type."""
        self._given[device_type] = value

    def get(self, device: torch.device) -> T | None:
        """The value for a device; None where torch's own operations serve, as on the CPU.

        Raises:
            SparseCompileError: a GPU, and nothing was given.
        """
        if device.type == "cuda" and device.type not in self._given:
            raise SparseCompileError(
                f"sparse_compile: nothing {self.purpose} on {device} yet, because the operators "
                "were not imported. Write import sparse_compile.ops first."
            )
        return self._given.get(device.type)


@dataclass(frozen=True)
class DeviceBuilder:
    """How one kind of device makes layouts.

    Attributes:
        layout: the blocks of a problem with its tables; the host may wait.
        packed: the same where there is room for every block: the host waits for nothing, and what
            :meth:`BlockLayout.pack` gives is made at once.
        has_room: whether there is.
        read_dense: ``(words, kinds, biased)`` of a dense mask with entries, for blocks of so many
            queries and keys, see :func:`sparse_compile.layout.from_dense.read_dense_in_torch`;
            None where no kernel reads it.
        compacted: lists of the rows and of the columns from int8 kinds [classes, rows, columns]
            that has entries, and whether the int32 flag [1] is set; waits once.
    """

    layout: Callable[[Problem, Sequence[Tensor], torch.device], BlockLayout]
    packed: Callable[[Problem, Sequence[Tensor], torch.device], BlockLayout]
    has_room: Callable[[Problem], bool]
    read_dense: Callable[[Tensor, int, int], tuple[Tensor, Tensor, Tensor] | None]
    compacted: Callable[[Tensor, Tensor], tuple[BlockLists, BlockLists, bool]]


BUILDERS: ByDevice[DeviceBuilder] = ByDevice("builds layouts")

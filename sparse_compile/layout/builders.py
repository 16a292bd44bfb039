"""Builders: the kernels that make layouts on a device, as values that are handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.expr import MaskExpr
from sparse_compile.layout.block_layout import BlockLayout, BlockLists
from sparse_compile.layout.by_device import ByDevice
from sparse_compile.layout.superset import Problem


@dataclass(frozen=True)
class DeviceBuilder:
    """How one kind of device makes layouts.

    Attributes:
        layout: the blocks of a problem, for its mask and tables; the host may wait.
        read_dense: ``(words, kinds, biased)`` of a dense mask with entries, for blocks of so many
            queries and keys, see :func:`sparse_compile.layout.from_dense.read_dense_in_torch`;
            None where no kernel reads it.
        compacted: lists of the rows and of the columns from int8 kinds [classes, rows, columns]
            that has entries, and whether the int32 flag [1] is set; waits once.
    """

    layout: Callable[[Problem, MaskExpr, Sequence[Tensor], torch.device], BlockLayout]
    read_dense: Callable[[Tensor, int, int], tuple[Tensor, Tensor, Tensor] | None]
    compacted: Callable[[Tensor, Tensor], tuple[BlockLists, BlockLists, bool]]


BUILDERS: ByDevice[DeviceBuilder] = ByDevice("builds layouts")

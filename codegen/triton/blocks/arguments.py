"""What launches of the generated kernels take, by name: operands, lists, mask data."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen.runtime.launch import table_values
from sparse_compile.codegen.triton.blocks.source import direct_lookups
from sparse_compile.codegen.triton.entries import table_ranks
from sparse_compile.expr import MaskExpr
from sparse_compile.layout import Layout
from sparse_compile.spec.view import Order


def is_usable(t: Tensor, described: bool) -> bool:
    """Whether kernels read a tensor as it is: rows are contiguous, and aligned for descriptors."""
    by_batch, by_head, by_token, by_dim = t.stride()
    # Offsets within a tile are int32.
    usable = (by_dim == 1 or t.shape[-1] == 1) and 0 <= by_token < 1 << 22
    if usable and described:
        unit = 16 // t.element_size()
        aligned = (by_batch | by_head | by_token) & unit - 1 == 0  # unit is a power of two
        usable = t.data_ptr() % 16 == 0 and aligned and min(by_batch, by_head, by_token) > 0
    return usable


@dataclass(frozen=True)
class Operands:
    """How what a call is given becomes what kernels read.

    Attributes:
        sign: that q is multiplied with.
        copied: names of tensors that are made contiguous.
        longer: tables that have to reach further: number, dimension and length.
    """

    sign: float
    copied: tuple[str, ...]
    longer: tuple[tuple[int, int, int], ...]

    @staticmethod
    def prepared(
        given: Mapping[str, Tensor],
        described: Collection[str],
        scale: float,
        longer: tuple[tuple[int, int, int], ...],
    ) -> Operands:
        """For tensors [B, H, N, D] like these, of which some are read by descriptors."""
        sign = positive(scale)[0]
        signed = {**given, "Q": given["Q"] if sign == 1 else given["Q"] * sign}
        copied = (name for name, t in signed.items() if not is_usable(t, name in described))
        return Operands(sign, tuple(copied), longer)

    def of(self, given: dict[str, Any], tables: Sequence[Tensor]) -> dict[str, Any]:
        """What a call gives by name, the tables of its mask added."""
        if self.sign != 1:
            given["Q"] = given["Q"] * self.sign
        for name in self.copied:
            given[name] = given[name].clone(memory_format=torch.contiguous_format)
        for number, table in enumerate(tables):
            given[f"t{number}"] = table
        for number, axis, n in self.longer:
            given[f"t{number}"] = lengthened(given[f"t{number}"], axis, n)
        return given


def positive(scale: float) -> tuple[float, float]:
    """``(sign, size)``, ``scale = sign * size``, size > 0: kernels compare scores unscaled."""
    if scale > 0:
        return 1.0, scale
    return (-1.0, -scale) if scale < 0 else (0.0, 1.0)


def single(grad_lse: Tensor | None, unused: Tensor) -> Tensor:
    """The gradient of the log-sum-exp; anything where there is none."""
    return unused if grad_lse is None else grad_lse.to(torch.float32).contiguous()


def list_values(layout: Layout, axis: str, own: Sequence[int]) -> dict[str, Any]:
    """Of each view of a section the lists, their room, lines, batches and heads, by name."""
    values: dict[str, Any] = {}
    for number in own:
        view = layout.views[number]
        side, lines = (view.rows, view.grid[0]) if axis == "q" else (view.cols, view.grid[1])
        values[f"start_{number}"] = side.start
        values[f"counts_{number}"] = side.counts
        values[f"index_{number}"] = side.index
        values[f"room_{number}"] = side.index.shape[1]
        values[f"lines_{number}"] = lines
        values[f"batches_{number}"], values[f"heads_{number}"] = view.batches, view.heads
    return values


@functools.lru_cache(maxsize=64)
def places_of(order: Order, n: int, device: torch.device) -> Tensor:
    """int64 [blocks * block]: the token at each place of an order, ``n`` where there is none."""
    base: Tensor = order.base(torch.arange(order.blocks(n)), n)[:, None]
    return (base + torch.tensor(order.offsets())).clamp(max=n).flatten().to(device)


def mask_values(mask: MaskExpr, tables: Mapping[str, Tensor]) -> dict[str, Any]:
    """The strides and sizes of tables, by the names of parameters."""
    values: dict[str, Any] = {}
    for number in table_ranks(mask):
        values |= table_values(number, tables[f"t{number}"])
    return {name: value for name, value in values.items() if not isinstance(value, Tensor)}


def too_short(
    mask: MaskExpr, tables: Sequence[Tensor], lengths: tuple[int, int]
) -> tuple[tuple[int, int, int], ...]:
    """Tables that a plain ``q`` or ``kv`` indexes beyond their end: number, dimension, length."""
    found = []
    for number, axis, coordinate in sorted(direct_lookups(mask)):
        n = lengths[0 if coordinate == "q" else 1]
        if tables[number].shape[axis] < n:
            found.append((number, axis, n))
    return tuple(found)


def lengthened(table: Tensor, axis: int, n: int) -> Tensor:
    """The table with its last entry along ``axis`` repeated up to length ``n``."""
    nearest = torch.arange(n, device=table.device).clamp_(max=table.shape[axis] - 1)
    return table.index_select(axis, nearest)


def gradient(of: Tensor, complete: bool) -> Tensor:
    """Room for a gradient; zeros where no section reaches every row."""
    return torch.empty(of.shape, dtype=of.dtype, device=of.device) if complete else zeros(of)


def zeros(of: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A gradient of zeros, contiguous."""
    return torch.zeros(of.shape, dtype=dtype or of.dtype, device=of.device)

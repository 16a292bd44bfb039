"""Hands the kernels of a GPU to layouts and selections, which know none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.codegen.triton.layout.build import DeviceProblem, has_room
from sparse_compile.codegen.triton.selection.choose import chooser
from sparse_compile.codegen.triton.selection.index_scores import scorer
from sparse_compile.codegen.triton.selection.window_scores import WindowScores, fits
from sparse_compile.layout import BlockLayout, BlockLists, Problem
from sparse_compile.layout import builders as of_layouts
from sparse_compile.selection import builders as of_selections
from sparse_compile.selection.builders import Windows


def hand_in() -> None:
    """Let layouts and selections of tensors on a GPU be made by kernels."""
    layouts = of_layouts.DeviceBuilder(_layout, _packed, has_room, _read_dense, _compacted)
    of_layouts.BUILDERS.give("cuda", layouts)
    selections = of_selections.DeviceBuilder(chooser, scorer, _window_scores)
    of_selections.BUILDERS.give("cuda", selections)


def _layout(problem: Problem, tables: Sequence[Tensor], device: torch.device) -> BlockLayout:
    made = DeviceProblem.of(problem, tables, device)
    return problem.layout(made.rows(), made.cols)


def _packed(problem: Problem, tables: Sequence[Tensor], device: torch.device) -> BlockLayout:
    return DeviceProblem.of(problem, tables, device).packed()


def _read_dense(mask: Tensor, block_q: int, block_kv: int) -> tuple[Tensor, Tensor, Tensor] | None:
    from sparse_compile.codegen.triton.layout import dense_kernel  # needs triton

    if mask.dtype == torch.float64 or not dense_kernel.supports(block_q, block_kv):
        return None
    return dense_kernel.read_dense(mask, block_q, block_kv)


def _compacted(kinds: Tensor, flag: Tensor) -> tuple[BlockLists, BlockLists, bool]:
    from sparse_compile.codegen.triton.layout.compact_kernel import compacted  # needs triton

    return compacted(kinds, flag)


def _window_scores(windows: Windows) -> WindowScores | None:
    return WindowScores(windows) if fits(windows) else None

"""Code generation: from a spec and a layout to something that runs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sparse_compile.codegen.call import Result, SelectedCall
from sparse_compile.layout import Layout
from sparse_compile.spec import AttentionSpec


class Executor(Protocol):
    """Runs block-sparse attention on one kind of device. Empty rows give 0 and lse = -inf."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: Sequence[Tensor],
        sizes: Sequence[int],
        layout: Layout,
        scale: float,
        spec: AttentionSpec,
    ) -> tuple[Tensor, Tensor]:
        """``(out [B, Hq, Nq, Dv], lse [B, Hq, Nq] fp32)``."""
        ...

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tables: Sequence[Tensor],
        sizes: Sequence[int],
        layout: Layout,
        scale: float,
        spec: AttentionSpec,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(dq, dk, dv)`` in the dtypes and shapes of q, k, v."""
        ...


def executor_for(device: torch.device) -> Executor:
    """The executor for tensors on ``device``: generated Triton kernels on a GPU, else the CPU one.

    Imported on first use, so that a machine without triton still runs the CPU executor.
    """
    room = "triton.blocks.executor" if device.type == "cuda" else "cpu.views"
    executor: Executor = importlib.import_module(f"sparse_compile.codegen.{room}")
    return executor


class SelectedExecutor(Protocol):
    """Runs attention over selected keys on one kind of device. Empty rows give 0 and lse = -inf."""

    def forward(self, call: SelectedCall) -> tuple[Tensor, Tensor]:
        """``(out [B, Hq, Nq, Dv], lse [B, Hq, Nq] fp32)``."""
        ...

    def backward(self, call: SelectedCall, result: Result) -> tuple[Tensor, Tensor, Tensor]:
        """``(dq, dk, dv)`` in the dtypes and shapes of q, k, v."""
        ...


def selected_executor_for(device: torch.device) -> SelectedExecutor:
    """The executor of attention over selected keys; as :func:`executor_for`."""
    room = "triton.selected.executor" if device.type == "cuda" else "cpu.selected"
    executor: SelectedExecutor = importlib.import_module(f"sparse_compile.codegen.{room}")
    return executor

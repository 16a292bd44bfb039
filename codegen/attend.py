"""Run an attention: each piece by the executor of its device, merged."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.generators import executor
from sparse_compile.codegen.merge import add, merge

Gradients = tuple[Tensor, Tensor, Tensor]


class Executor(Protocol):
    """Runs a piece of an attention on one kind of device. Empty rows give 0 and lse = -inf."""

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """``(out [B, Hq, Nq, Dv] in q's dtype, lse [B, Hq, Nq] fp32)``."""
        ...

    def backward(self, call: AttentionCall, result: AttentionResult) -> Gradients:
        """``(dq, dk, dv)`` in the dtypes and shapes of q, k, v."""
        ...


def executor_for(piece: AttentionCall) -> Executor:
    """The executor of a piece: generated Triton kernels on a GPU, else PyTorch's operators.

    Imported on first use, so that a machine without triton still runs those of the CPU.
    """
    found: Executor = executor("units" if piece.spec.units else "blocks", piece.q.device.type)
    return found


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of an attention, whatever covers its mask. Empty rows give 0 and -inf."""
    results = [executor_for(piece).forward(piece) for piece in call.pieces()]
    return merge(results, call.q.dtype)


def backward(call: AttentionCall, result: AttentionResult) -> Gradients:
    """``(dq, dk, dv)`` of :func:`forward`; ``result`` holds 0 on empty rows."""
    return add([executor_for(piece).backward(piece, result) for piece in call.pieces()])

"""Run an attention: each piece by the executor of its device, merged.

Pieces attend to disjoint keys. With their results out_i and log-sum-exps lse_i,

    lse = log(sum_i exp(lse_i)),    out = sum_i exp(lse_i - lse) out_i

and the gradients of q, k and v are the sums of those of the pieces, each computed with the merged
out and lse: exp(score - lse) is then the weight of a key among all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.generators import executor

#: Of q, k and v; then of the learned tensors that are wanted.
Gradients = tuple[Tensor, ...]


class Executor(Protocol):
    """Runs a piece of an attention on one kind of device. Empty rows give 0 and lse = -inf."""

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """``(out [B, Hq, Nq, Dv] in q's dtype, lse [B, Hq, Nq] fp32)``."""
        ...

    def backward(self, call: AttentionCall, result: AttentionResult) -> Gradients:
        """``(dq, dk, dv, *wanted)`` in the dtypes and shapes of q, k, v and of learned tensors.

        The first three are stored as [B, N, H, D], by token.
        """
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
    """The gradients of :func:`forward`; ``result`` holds 0 on empty rows."""
    return add([executor_for(piece).backward(piece, result) for piece in call.pieces()])


def merge(results: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention to the keys of disjoint pieces, from ``(out, lse)`` of each.

    Args:
        results: out [..., Dv], 0 on empty rows, and lse [...] in fp32, -inf on empty rows.
        dtype: of the merged out.

    >>> from math import inf, log
    >>> one, two = torch.tensor([[1.0], [1.0], [0.0]]), torch.tensor([[4.0], [0.0], [0.0]])
    >>> lse, more_lse = torch.tensor([0, 0, -inf]), torch.tensor([log(2), -inf, -inf])
    >>> out, total = merge([(one, lse), (two, more_lse)], torch.float32)
    >>> [round(value, 3) for value in out.flatten().tolist()], total.isinf().tolist()
    ([3.0, 1.0, 0.0], [False, False, True])
    """
    if len(results) == 1:
        return results[0]
    total = functools.reduce(torch.logaddexp, [lse for _, lse in results])
    # Rows without any key keep the 0 that all pieces gave them.
    known = total.masked_fill(total.isneginf(), 0)
    weighed = [(lse - known).exp().unsqueeze(-1) * out for out, lse in results]
    return functools.reduce(torch.add, weighed).to(dtype), total


def add(grads: Sequence[Gradients]) -> Gradients:
    """The gradients, from those of each piece."""
    return tuple(functools.reduce(torch.add, parts) for parts in zip(*grads, strict=True))

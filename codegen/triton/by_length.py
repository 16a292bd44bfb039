"""Attention to blocks on a GPU: by one tile where that holds all of a head, else by lists."""

from __future__ import annotations

from torch import Tensor

from sparse_compile.codegen.attend import Executor, Gradients
from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.triton.blocks import executor as listed
from sparse_compile.codegen.triton.short import executor as short
from sparse_compile.codegen.triton.short.spec import is_short


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """As :meth:`sparse_compile.codegen.attend.Executor.forward`."""
    return _executor(call).forward(call)


def backward(call: AttentionCall, result: AttentionResult) -> Gradients:
    """As :meth:`sparse_compile.codegen.attend.Executor.backward`."""
    return _executor(call).backward(call, result)


def _executor(call: AttentionCall) -> Executor:
    return short if is_short(call) else listed

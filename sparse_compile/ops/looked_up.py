"""Numbers looked up in a trained table: as indexing, with a gradient that is the same each time.

T5 looks up 16383 distances in 32 rows. Inductor adds their gradients up by atomic additions, most
of which wait for one another, in an order that differs from run to run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen.added_up import added_up
from sparse_compile.ops.registered import operator


def _like_looked_up(table: Tensor, indices: Sequence[Tensor]) -> Tensor:
    return table.new_empty(functools.reduce(torch.add, indices).shape)


@operator(_like_looked_up)
def looked_up(table: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """``table[indices]``.

    Args:
        table: floating, of as many dimensions as there are indices.
        indices: integers that broadcast together, none of them negative.
    """
    return table[tuple(indices)]


def _like_gradient(grad: Tensor, sizes: Sequence[int]) -> Tensor:
    return grad.new_empty(list(sizes))


@operator(_like_gradient)
def looked_up_backward(grad: Tensor, indices: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The gradient of a table; sums are in fp32, or the dtype of ``grad`` if that is wider."""
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    return added_up(wide, indices, sizes).to(grad.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, indices = inputs
    ctx.save_for_backward(*indices)
    ctx.sizes = table.shape


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None]]:
    indices = ctx.saved_tensors
    return looked_up_backward(grad, indices, ctx.sizes), [None] * len(indices)


looked_up.register_autograd(_backward, setup_context=_setup_context)

#: The operator as nodes of a graph call it.
LOOKED_UP = torch.ops.sparse_compile.looked_up.default

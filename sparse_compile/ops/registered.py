"""How every operator is registered, and the one place that stores results as their fakes promise.

Inductor compiles code for the strides that a fake has: a result of other strides, such as a slice
of what a kernel padded, crashes it or is misread. Two rules serve all operators: results are
contiguous, and that of an attention is stored by tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.library import custom_op, infer_schema

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef


def operator(
    name: str, *, tags: Sequence[torch.Tag] = (), by_token: bool = False
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register a function as ``sparse_compile::name``; it changes none of its arguments.

    Its results are contiguous; its fake must make them so, as ``new_empty`` does.

    Args:
        name: of the operator.
        tags: of the operator.
        by_token: whether its first result, [B, H, N, D], is stored as [B, N, H, D]: what a
            projection back to [B, N, H * D] reads.
    """

    def register(run: Callable[..., Any]) -> CustomOpDef:
        @wraps(run)
        def stored(*args: Any, **kwargs: Any) -> Any:
            return _stored(run(*args, **kwargs), by_token)

        schema = infer_schema(run, mutates_args=())
        return custom_op(
            f"sparse_compile::{name}", stored, mutates_args=(), schema=schema, tags=tuple(tags)
        )

    return register


def _stored(results: Any, by_token: bool) -> Any:
    if isinstance(results, Tensor):
        return _contiguous(results)
    first, *rest = results
    first = _contiguous(first.transpose(1, 2)).transpose(1, 2) if by_token else _contiguous(first)
    return type(results)([first, *map(_contiguous, rest)])


def _contiguous(t: Tensor) -> Tensor:
    """The tensor with just the strides of a new one of its shape.

    Tensor.contiguous() keeps any strides where they do not matter: of axes of size one, and of
    tensors without entries.

    >>> empty = torch.empty(2, 0, 3)[..., :2]
    >>> empty.contiguous().stride(), _contiguous(empty).stride()
    ((3, 3, 1), (2, 2, 1))
    """
    strides, step = [1] * t.dim(), 1
    for dim in reversed(range(t.dim())):
        strides[dim] = step
        step *= max(t.shape[dim], 1)
    if t.stride() == tuple(strides):
        return t
    return t.contiguous().as_strided(t.shape, strides)

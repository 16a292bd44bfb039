"""How every operator is registered, and the one place that stores results as their fakes promise.

Inductor compiles code for the strides that a fake has: a result of other strides, such as a slice
of what a kernel padded, crashes it or is misread. Two rules serve all operators: results are
contiguous, and that of an attention is stored by tokens, as are its gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.library import custom_op, infer_schema

from sparse_compile.codegen.repeated import Kind, repeated

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef


#: The attribute of ``torch.ops.sparse_compile.<name>`` that is the function behind the operator.
RUN = "run"
#: The names of all operators.
OPERATORS: list[str] = []


def operator(
    fake: Callable[..., Any],
    *,
    recorded: bool = True,
    by_token: int = 0,
    kind: Callable[..., Kind] | None = None,
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register a function as ``sparse_compile::<its name>``; it changes none of its arguments.

    Its results are contiguous; its fake must make them so, as ``new_empty`` does.

    Args:
        fake: makes fake results from those of the operator's arguments that it names.
        recorded: whether a CUDA graph may hold it; one would replay what the first call found out
            on the host, or in tensors that are no arguments.
        by_token: so many of its first results, [B, H, N, D], are stored as [B, N, H, D]: what a
            projection back to [B, N, H * D] reads, and what the gradient of one that made
            [B, N, H * D] does.
        kind: of calls that are repeated, see :mod:`sparse_compile.codegen.repeated`.
    """

    def register(run: Callable[..., Any]) -> CustomOpDef:
        @wraps(run)
        def stored(*args: Any, **kwargs: Any) -> Any:
            return _stored(run(*args, **kwargs), by_token)

        called: Callable[..., Any] = stored if kind is None else repeated(kind)(stored)
        schema = infer_schema(run, mutates_args=())
        name = f"sparse_compile::{run.__name__}"
        tags = () if recorded else (torch.Tag.cudagraph_unsafe,)
        made = custom_op(name, called, mutates_args=(), schema=schema, tags=tags)
        made.register_fake(_by_name(fake, inspect.signature(run)))
        # What compiled code calls: its tensors need neither autograd nor a dispatcher any more.
        setattr(getattr(torch.ops.sparse_compile, run.__name__), RUN, called)
        OPERATORS.append(run.__name__)
        return made

    return register


def _by_name(fake: Callable[..., Any], arguments: inspect.Signature) -> Callable[..., Any]:
    """A function of all arguments, of which ``fake`` gets those that it names."""
    named = inspect.signature(fake).parameters

    def of_all(*args: Any, **kwargs: Any) -> Any:
        given = arguments.bind(*args, **kwargs).arguments
        return fake(**{name: given[name] for name in named})

    return of_all


def fake_lists(like: Tensor, rows: Sequence[Any], room: Any) -> tuple[Tensor, Tensor]:
    """An index [*rows, room] and a count [*rows], int32, for the fake of what selects."""
    index = like.new_empty([*rows, room], dtype=torch.int32)
    return index, like.new_empty([*rows], dtype=torch.int32)


#: Axes of [B, H, N, D] from the outermost in memory, where tokens are stored one after another.
_BY_TOKEN = (0, 2, 1, 3)


def _stored(results: Any, by_token: int) -> Any:
    if isinstance(results, Tensor):
        return _in_order(results)
    ahead = [_in_order(t, _BY_TOKEN) for t in results[:by_token]]
    return type(results)([*ahead, *map(_in_order, results[by_token:])])


def _in_order(t: Tensor, axes: Sequence[int] = ()) -> Tensor:
    """The tensor with just the strides of a new one, with its axes in this order in memory.

    Tensor.contiguous() keeps any strides where they do not matter: of axes of size one, and of
    tensors without entries.

    >>> empty = torch.empty(2, 0, 3)[..., :2]
    >>> empty.contiguous().stride(), _in_order(empty).stride()
    ((3, 3, 1), (2, 2, 1))
    """
    shape, step = t.shape, 1
    axes = axes or range(len(shape))
    strides = [1] * len(shape)
    for axis in reversed(axes):
        strides[axis] = step
        step *= max(shape[axis], 1)
    if t.stride() == tuple(strides):
        return t
    return t.permute(*axes).contiguous().as_strided(shape, strides)

"""What is wrong with a call that cannot even be captured, said clearly.

Dynamo raises its own errors for shapes and dtypes that do not fit together, before any backend
sees the graph. ``explain`` then runs the call once more, checking each attention as it is called.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparse_compile.errors import BadShape, SparseCompileError
from sparse_compile.ops.operands import check_operands


def bad_attention(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> SparseCompileError | None:
    """The first attention in ``model(*args, **kwargs)`` whose arguments do not fit together.

    Returns:
        the error to raise, naming the values, the source line and what to write instead; None when
        no attention is to blame.
    """
    try:
        with _CheckedAttention():
            model(*args, **kwargs)
    except SparseCompileError as error:
        return error
    except Exception:
        # The call fails for a reason of its own, and whoever asked has its error already.
        return None
    return None


class _CheckedAttention(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            _check_call(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _check_call(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> None:
    try:
        q, k, v = (t if t.dim() != 3 else t.unsqueeze(1) for t in (query, key, value))
        check_operands(q, k, v)
        if attn_mask is not None:
            check_mask(list(attn_mask.shape), [*query.shape[:-1], key.shape[-2]])
    except SparseCompileError as error:
        error.args = (f"{error}\n    at {_user_line()}",)
        raise


def check_mask(mask: list[int], scores: list[int]) -> None:
    """Raise if a mask of shape ``mask`` does not broadcast to scores [B, Hq, Nq, Nkv].

    Raises:
        BadShape: naming the dimension that does not fit.

    >>> check_mask([8, 8], [2, 4, 8, 8])
    >>> check_mask([7, 8], [2, 4, 8, 8])
    Traceback (most recent call last):
    sparse_compile.errors.BadShape: sparse_compile: an attention mask of shape [7, 8] does not \
broadcast to the scores [2, 4, 8, 8]. Its dimension -2 is 7: make it 8 or 1.
    """
    text = f"sparse_compile: an attention mask of shape {mask} does not broadcast to the scores"
    if len(mask) > len(scores):
        raise BadShape(f"{text} {scores}. Give it at most {len(scores)} dimensions.")
    for dim in range(-1, -len(mask) - 1, -1):
        if mask[dim] not in (1, scores[dim]):
            fix = f"Its dimension {dim} is {mask[dim]}: make it {scores[dim]} or 1."
            raise BadShape(f"{text} {scores}. {fix}")


def _user_line() -> str:
    """The innermost source line that is neither torch's nor this package's."""
    frames = traceback.extract_stack(inspect.currentframe())
    own = (str(Path(__file__).parents[1]), *torch.__path__, "<")
    mine = [f for f in frames if not f.filename.startswith(own)]
    return f"{mine[-1].filename}:{mine[-1].lineno} in {mine[-1].name}" if mine else "unknown"

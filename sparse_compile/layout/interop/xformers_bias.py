"""The attention biases of xFormers as patterns, known by their names: nothing imports xFormers.

A class means what its name says as long as no subclass of it writes ``materialize`` anew. All
others are read through that method, which every bias has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile.errors import BadPattern
from sparse_compile.patterns import Causal, Documents, Pattern, SlidingWindow

#: The methods that say what a bias means.
_MEANING = ("materialize", "_create_block_mask")
_LOWER_RIGHT = "lower_right"


def from_xformers(bias: Any, shape: tuple[int, int] | None = None) -> Pattern | Tensor:
    """An xFormers ``attn_bias`` as a pattern, or else as the dense mask that it stands for.

    Sequence lengths are read now: a bias that is updated in place needs a new pattern.

    Args:
        bias: an ``AttentionBias``, such as ``LowerTriangularMask()``.
        shape: ``(n_q, n_kv)``, or more dimensions in front. Needed for biases that are no pattern.

    Returns:
        A pattern; or a bool tensor of ``shape``, True where a query attends.

    Raises:
        BadPattern: no bias, one that adds something to scores, or one that needs ``shape``.

    >>> class LowerTriangularMask: ...
    >>> from_xformers(LowerTriangularMask())
    Causal()
    """
    for kind in type(bias).__mro__:
        make = _PATTERNS.get(kind.__name__)
        if make is not None:
            pattern = make(bias)
            if pattern is not None:
                return pattern
        if make is not None or any(name in vars(kind) for name in _MEANING):
            break
    return _materialized(bias, shape)


def _local(bias: Any) -> Pattern | None:
    left, right = int(bias.window_left), int(bias.window_right)
    return SlidingWindow(left, right, _LOWER_RIGHT) if left or right else None


def _window(bias: Any, align: str = "upper_left") -> Pattern | None:
    """A causal window, the query's own key among those that are counted."""
    size = int(bias._window_size)
    return SlidingWindow(size - 1, 0, align) if size > 1 else None


def _documents(bias: Any) -> Documents | None:
    starts, key_starts = _starts(bias.q_seqinfo), _starts(bias.k_seqinfo)
    if starts is None or key_starts is None or len(starts) != len(key_starts):
        return None
    if starts == key_starts:
        return Documents(cu_seqlens=starts)
    return Documents(_ids(key_starts), q_ids=_ids(starts))


def _windowed_documents(bias: Any) -> Pattern | None:
    return _with(_documents(bias), _window(bias))


def _with(documents: Documents | None, distance: Pattern | None) -> Pattern | None:
    """Both; a distance within documents is one between tokens only if all queries are keys."""
    if documents is None or documents.q_ids is not None or distance is None:
        return None
    return documents & distance


def _starts(info: Any) -> tuple[int, ...] | None:
    """Where each sequence starts, and the end of the last; None if there are gaps between them."""
    if hasattr(info, "seqlen"):
        return None
    for name in ("seqstart_py", "cu_seqlen_py", "seqstart", "cu_seqlen"):
        starts = getattr(info, name, None)
        if starts is not None:
            return tuple(map(int, starts))
    return None


def _ids(starts: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.tensor(starts).diff())


#: How to read each class; None from one of these means: not a pattern, as it stands.
_PATTERNS: dict[str, Callable[[Any], Pattern | None]] = {
    "LowerTriangularMask": lambda bias: Causal(),
    "LowerTriangularFromBottomRightMask": lambda bias: Causal(_LOWER_RIGHT),
    "LowerTriangularFromBottomRightLocalAttentionMask": lambda bias: _window(bias, _LOWER_RIGHT),
    "LocalAttentionFromBottomRightMask": _local,
    "BlockDiagonalMask": _documents,
    "BlockDiagonalCausalMask": lambda bias: _with(_documents(bias), Causal()),
    "BlockDiagonalCausalFromBottomRightMask": lambda bias: _with(_documents(bias), Causal()),
    "BlockDiagonalCausalLocalAttentionMask": _windowed_documents,
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": _windowed_documents,
}


def _materialized(bias: Any, shape: tuple[int, int] | None) -> Tensor:
    name = type(bias).__name__
    if not hasattr(bias, "materialize"):
        raise BadPattern(
            f"sparse_compile: {name} is no attention bias of xFormers: it has no materialize "
            "method. Pass an AttentionBias, such as LowerTriangularMask()."
        )
    if shape is None:
        raise BadPattern(
            f"sparse_compile: {name} is not one of the patterns, and how large its mask is must be "
            "said. Write from_xformers(bias, (n_q, n_kv))."
        )
    added: Tensor = bias.materialize(tuple(shape), dtype=torch.float32)
    attends = added != float("-inf")
    if bool((attends & (added != 0)).any()):
        raise BadPattern(
            f"sparse_compile: {name} adds values other than 0 and -inf to scores, and is no mask. "
            "Add the bias in the model, and pass a bias that only masks."
        )
    return attends

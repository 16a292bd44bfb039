"""The masks of models under ``attn_implementation="sparse_compile"``: they stay functions.

transformers hands a mask to an implementation as a function of (batch, head, query, key). Where
code runs as it stands, that function is handed on to the layers and becomes a pattern; while
torch.compile traces, the graph holds what it computes, which this library's backend reads. So in
neither case is there a mask of all pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    padding_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from sparse_compile.errors import BadPattern
from sparse_compile.integrations.transformers.masked import MaskFunction


class PreparedMask(BlockMask):
    """A mask function as a mask of the one kind, besides tensors, that models let through.

    Args:
        function: who may attend to whom.
        size: [B, 1, Nq, Nkv].
    """

    def __init__(self, function: MaskFunction, size: tuple[int, int, int, int]) -> None:
        # It holds no blocks: they are found for the kernels that run.
        self.function, self.size = function, size

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the mask of all pairs."""
        return self.size

    def contiguous(self) -> PreparedMask:
        """Itself."""
        return self

    def to(self, device: torch.device | str, *args: Any, **kwargs: Any) -> PreparedMask:
        """Itself: what it reads is moved where it is read."""
        return self

    def __repr__(self) -> str:
        return f"PreparedMask({self.function}, {self.size})"

    __str__ = __repr__


#: As transformers hands them over: ``(batch_idx, head_idx, q_idx, kv_idx)``.
Function = Callable[[Any, Any, Any, Any], Any]


def mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Function = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **given: Any,
) -> PreparedMask | Tensor | None:
    """The mask of a model's layers, as ``transformers.masking_utils`` asks for it.

    Args:
        batch_size, q_length, kv_length: how many sequences, queries and keys.
        q_offset, kv_offset: the places of the first of them, with a cache.
        mask_function: whether a query may attend to a key, by their places.
        attention_mask: [B, keys so far], False at padding.
        use_vmap: whether a user made it, who may have done what does not broadcast.
        **given: what :func:`transformers.masking_utils.sdpa_mask` takes besides.

    Returns:
        a function; a bool tensor [B, 1, q_length, kv_length] while torch.compile traces, for a
        single query, and where a user's function is no expression; None as ``sdpa_mask`` does.
    """
    places = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "use_vmap": use_vmap,
    }
    if torch.compiler.is_compiling() or q_length == 1:
        tensor: Tensor | None = sdpa_mask(**places, **given)
        return tensor
    # It is read when attention runs, and the cache counts on before.
    offset = int(q_offset)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None and not bool(padding.all()):
        mask_function = and_masks(mask_function, padding_mask_function(padding))
    found = MaskFunction(_moved(mask_function, offset, kv_offset))
    if use_vmap and not _is_expression(found):
        return sdpa_mask(**{**places, "q_offset": offset}, **given)  # type: ignore[no-any-return]
    return PreparedMask(found, (batch_size, 1, q_length, kv_length))


def _moved(function: Function, q_offset: int, kv_offset: int) -> Function:
    # Of heads transformers asks for the first alone, whose mask is that of all.
    return lambda b, h, q, kv: function(b, 0 * h, q + q_offset, kv + kv_offset)


def _is_expression(found: MaskFunction) -> bool:
    try:
        found.pattern.bound()
    except BadPattern:
        return False
    return True

"""What is known of a tensor, while it lives and holds what it held."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def state_of(tensor: Tensor) -> tuple[Any, ...] | None:
    """What changes when a living tensor is modified; None where that cannot be told.

    Changes that autograd does not see, through ``tensor.data`` or another library, go unnoticed, as
    they do in autograd. Where such changes are usual there is no state: inference tensors count no
    modifications, and the results of a CUDA graph are overwritten by its next run.

    >>> mask = torch.ones(2, 2)
    >>> before = state_of(mask)
    >>> state_of(mask) == before, state_of(mask.zero_()) == before
    (True, False)
    """
    if tensor.is_inference() or (tensor.is_cuda and not _is_of_the_allocator(tensor)):
        return None
    shape = tuple(tensor.shape), tensor.stride(), tensor.dtype
    return tensor._version, tensor.data_ptr(), *shape


def _is_of_the_allocator(tensor: Tensor) -> bool:
    """Whether PyTorch allocated the memory of a CUDA tensor for it alone.

    Inductor's CUDA graphs hand out the same tensors again and again, made of a bare address, and
    count no modification when they write to them.
    """
    return bool(torch._C._has_Standard_Deleter(tensor.untyped_storage()._cdata))


@dataclass(frozen=True)
class _Memory:
    """What is known of one tensor, in one state."""

    of: weakref.ref[Tensor]
    state: tuple[Any, ...]
    known: dict[Hashable, Any] = field(default_factory=dict)


#: By id, because tensors compare entry by entry. An entry goes when its tensor does.
_MEMORIES: dict[int, _Memory] = {}


def memory_of(tensor: Tensor) -> dict[Hashable, Any]:
    """What is known of a tensor, to read and to add to.

    Forgotten when the tensor dies or its :func:`state_of` changes; at once if it has none. What is
    put in must not refer to the tensor, or that lives for ever.
    """
    state, number = state_of(tensor), id(tensor)
    if state is None:
        return {}
    memory = _MEMORIES.get(number)
    if memory is not None and memory.of() is tensor and memory.state == state:
        return memory.known

    def forget(of: weakref.ref[Tensor]) -> None:
        # Another tensor may have got the same id since.
        entry = _MEMORIES.get(number)
        if entry is not None and entry.of is of:
            del _MEMORIES[number]

    memory = _Memory(weakref.ref(tensor, forget), state)
    _MEMORIES[number] = memory
    return memory.known

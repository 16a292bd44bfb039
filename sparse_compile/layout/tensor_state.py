"""Whether a tensor still holds what was found out about it."""

from __future__ import annotations

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

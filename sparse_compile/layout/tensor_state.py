"""What is known of a tensor, while its memory lives and counts no modification."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.storage import UntypedStorage


def state_of(tensor: Tensor) -> Hashable:
    """What changes when a living tensor is written to or gets other memory; None where unknown.

    >>> mask = torch.ones(2, 2)
    >>> before = state_of(mask)
    >>> state_of(mask) == before, state_of(mask.zero_()) == before
    (True, False)
    """
    version = _version_of(tensor)
    if version is None:
        return None
    return version, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _version_of(tensor: Tensor) -> int | None:
    """What changes when a living tensor is modified; None where that cannot be told.

    Changes that autograd does not see, through ``tensor.data`` or another library, go unnoticed, as
    they do in autograd: so only who makes a tensor, or a user who says that it stays, may build on
    it. Where such changes are usual there is no version: inference tensors count no modifications,
    and the results of a CUDA graph are overwritten by its next run.
    """
    # Inductor's CUDA graphs hand out the same tensors again and again, made of a bare address that
    # PyTorch did not allocate for them, and count no modification when they write to them.
    if tensor.is_inference() or (
        tensor.is_cuda and not torch._C._has_Standard_Deleter(tensor.untyped_storage()._cdata)
    ):
        return None
    return tensor._version


#: Of each storage, the version in which something is known of its tensors, and what, by their
#: places in it. It is the storage that is referred to, not the tensor: a tensor that something
#: refers to cannot be swapped. An entry goes when its storage does.
_MEMORIES: WeakKeyDictionary[UntypedStorage, tuple[int, dict[Hashable, dict[Hashable, Any]]]] = (
    WeakKeyDictionary()
)


def memory_of(tensor: Tensor) -> dict[Hashable, Any]:
    """What is known of a tensor, to read and to add to.

    Forgotten when its memory is freed or a modification counted; at once if it counts none. What is
    put in must not refer to the tensor, or that lives for ever.

    >>> mask = torch.ones(2, 2)
    >>> memory_of(mask)["sum"] = 4
    >>> memory_of(mask), memory_of(mask[0]), memory_of(mask.zero_())
    ({'sum': 4}, {}, {})
    """
    version, storage = _version_of(tensor), tensor.untyped_storage()
    if version is None:
        return {}
    then, known = _MEMORIES.get(storage, (None, {}))
    if then != version:
        known = {}
        _MEMORIES[storage] = version, known
    view = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
    return known.setdefault(view, {})

"""What is kept between calls: by content, within a budget of bytes."""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

from torch import Tensor


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=_Sized)


class BoundedCache(Generic[T]):
    """The most recently used values, at most ``max_bytes`` of them together."""

    def __init__(self, max_bytes: int) -> None:
        """An empty cache with this budget."""
        self.max_bytes = max_bytes
        #: Bytes held.
        self.nbytes = 0
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value under ``key``, made if it is not there."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            if key not in self._values and value.nbytes <= self.max_bytes:
                self._values[key] = value
                self.nbytes += value.nbytes
            while self.nbytes > self.max_bytes:
                self.nbytes -= self._values.popitem(last=False)[1].nbytes
        return value


def fingerprint(tensors: Sequence[Tensor], max_bytes: int | None = None) -> bytes | None:
    """A digest of the content of CPU tensors; None beyond ``max_bytes``.

    >>> import torch
    >>> a, b = torch.arange(4), torch.arange(4)
    >>> fingerprint([a]) == fingerprint([b]), fingerprint([a]) == fingerprint([a, b])
    (True, False)
    """
    if max_bytes is not None and sum(t.numel() * t.element_size() for t in tensors) > max_bytes:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        tensor = tensor.detach().contiguous()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        size = tensor.numel() * tensor.element_size()
        digest.update(ctypes.string_at(tensor.data_ptr(), size))
    return digest.digest()

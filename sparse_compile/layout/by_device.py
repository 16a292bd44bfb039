"""What is handed in for each kind of device: kernels, which this side cannot import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from sparse_compile.errors import SparseCompileError

T = TypeVar("T")


@dataclass(frozen=True)
class ByDevice(Generic[T]):
    """A value for each type of device; :mod:`sparse_compile.ops` fills it when it is imported.

    Attributes:
        purpose: what the values are for, in errors.
    """

    purpose: str
    _given: dict[str, T] = field(default_factory=dict)

    def give(self, device_type: str, value: T) -> None:
        """Use ``value`` on devices of a type."""
        self._given[device_type] = value

    def get(self, device: torch.device) -> T | None:
        """The value for a device; None where torch's own operations serve, as on the CPU.

        Raises:
            SparseCompileError: a GPU, and nothing was given.
        """
        if device.type == "cuda" and device.type not in self._given:
            raise SparseCompileError(
                f"sparse_compile: nothing {self.purpose} on {device} yet, because the operators "
                "were not imported. Write import sparse_compile.ops first."
            )
        return self._given.get(device.type)

"""Target: all of a machine that a decision may depend on; the same on every rank."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """A device, as decisions see it.

    Attributes:
        kind: ``"cuda"``, ``"cpu"``, or what nothing here runs on.
        arch: ``"sm_90"`` and the like; of a CPU ``"interpreter"``; empty for a GPU not at hand.
        workers: multiprocessors of a GPU; threads that PyTorch uses on a CPU.
    """

    kind: str
    arch: str
    workers: int = 0

    @staticmethod
    def of(device: torch.device) -> Target:
        """The target of tensors on a device."""
        if device.type not in ("cuda", "cpu"):
            return Target(device.type, "", 1)
        if device.type == "cuda":
            return _gpu(device)
        return Target(device.type, "interpreter", torch.get_num_threads())


@functools.lru_cache(maxsize=16)
def _gpu(device: torch.device) -> Target:
    if not torch.cuda.is_available():
        return Target("cuda", "")
    found = torch.cuda.get_device_properties(device)
    return Target("cuda", f"sm_{found.major}{found.minor}", found.multi_processor_count)

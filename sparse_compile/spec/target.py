"""Target: all of a machine that a decision may depend on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """A device, as decisions see it.

    Attributes:
        kind: ``"cuda"``, ``"cpu"``, or what nothing here runs on.
        arch: ``"sm_90"`` and the like; of a CPU ``"interpreter"``.
        workers: multiprocessors of a GPU; threads that PyTorch uses on a CPU.
    """

    kind: str
    arch: str
    workers: int

    @staticmethod
    def of(device: torch.device) -> Target:
        """The target of tensors on a device."""
        if device.type not in ("cuda", "cpu"):
            return Target(device.type, "", 1)
        if device.type == "cuda":
            workers = torch.cuda.get_device_properties(device).multi_processor_count
        else:
            workers = torch.get_num_threads()
        return Target(device.type, arch_of(device), workers)


def arch_of(device: torch.device) -> str:
    """``"sm_90"`` and the like; ``"interpreter"`` for CPU tensors."""
    if device.type == "cpu":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"

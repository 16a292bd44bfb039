"""Operators compute in the dtypes that they are given, whatever autocast would make of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: str) -> AbstractContextManager[object]:
    """Autocast turned off for a type of device.

    >>> x = torch.ones(1, 1)
    >>> with torch.autocast("cpu", torch.bfloat16), full_precision("cpu"):
    ...     (x @ x).dtype
    torch.float32
    """
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()

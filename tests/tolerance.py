"""The rule of tolerance, in one place.

fp32: relative error at most 1e-5. Half precision: error against fp64 at most 1.1 times that of the
dense eager program in the same precision.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(value: Tensor, truth: Tensor) -> float:
    """``||value - truth|| / ||truth||`` in fp64; infinite when NaNs do not coincide."""
    value, truth = value.detach().double(), truth.detach().double()
    if not torch.equal(value.isnan(), truth.isnan()):
        return float("inf")
    value, truth = value.nan_to_num(0.0), truth.nan_to_num(0.0)
    norm = truth.norm().item()
    return (value - truth).norm().item() / norm if norm else (value - truth).norm().item()


def assert_close_as_eager(name: str, ours: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Apply the rule; ``eager`` is the dense program in the dtype of ``ours``, ``truth`` fp64."""
    error, eager_error = relative_error(ours, truth), relative_error(eager, truth)
    allowed = 1e-5 if ours.dtype == torch.float32 else 1.1 * eager_error
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"

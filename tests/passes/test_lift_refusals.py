"""Masks that are left alone, and what the user is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.lifting import attend, refused
from tests.passes.test_lift_idioms import inputs, m6_sliding

Mask = Callable[..., Tensor]


@pytest.mark.parametrize(
    "bias",
    [
        lambda x: -0.5 * (torch.arange(16)[:, None] - torch.arange(16)).abs().float(),
        lambda x: torch.randn(16, 16),
        lambda x: torch.where(torch.ones(16, 16).tril().bool(), 0.0, -100.0),
        lambda x: torch.where(torch.ones(16, 16).tril().bool(), 1.0, float("-inf")),
        lambda x: x[..., :1].transpose(-1, -2),
    ],
)
def test_biases_are_refused(bias: Mask) -> None:
    found = refused(lambda x: attend(x, bias(x)), inputs(2, 16)["x"])
    assert "bias" in found.reason


def test_padding_of_unknown_integers_is_not_a_mask() -> None:
    def old_bert(x: Tensor, pad: Tensor) -> Tensor:
        return attend(x, (1.0 - pad[:, None, None, :]) * torch.finfo(x.dtype).min)

    given = inputs(2, 16)
    found = refused(old_bert, given["x"], given["pad"])
    assert "need not be 0 and 1" in found.reason


def test_a_check_that_is_too_large_is_refused_with_the_option() -> None:
    found = refused(lambda x: attend(x, m6_sliding(x)), inputs(2, 16)["x"], verify_bytes=100)
    assert "verify_bytes" in found.reason
    assert '"verify_bytes": 256' in found.hint

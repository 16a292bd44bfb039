"""Masks that are left alone, and what the user is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.lifting import attend, lifted, refused
from tests.passes.test_lift_idioms import inputs, m6_sliding

Mask = Callable[..., Tensor]


@pytest.mark.parametrize(
    "bias",
    [
        lambda x: -0.5 * (torch.arange(16)[:, None] - torch.arange(16)).abs().float(),
        lambda x: torch.where(torch.ones(16, 16).tril().bool(), 0.0, -100.0),
        lambda x: torch.where(torch.ones(16, 16).tril().bool(), 1.0, float("-inf")),
    ],
)
def test_biases_that_follow_from_positions_are_read(bias: Mask) -> None:
    found = lifted(lambda x: attend(x, bias(x)), inputs(2, 16)["x"])
    assert found.score is not None


def test_a_bias_that_may_be_a_mask_is_refused() -> None:
    given = inputs(2, 16)["x"]
    found = refused(attend, given, torch.randn(16, 16))
    assert "only known at run time" in found.reason
    found = refused(lambda x: attend(x, x[..., :1].mT * -1e9), given)
    assert "may be a mask" in found.reason


def test_padding_of_unknown_integers_is_a_mask_where_they_are_0_and_1() -> None:
    def old_bert(x: Tensor, pad: Tensor) -> Tensor:
        return attend(x, (1.0 - pad[:, None, None, :]) * torch.finfo(x.dtype).min)

    given = inputs(2, 16)
    found = lifted(old_bert, given["x"], given["pad"])
    assert str(found.mask) == "Ne(t0(b, kv), 0)"
    assert "w0(b, 0, 0, kv)" in str(found.score)  # of other integers


def test_a_check_that_is_too_large_is_refused_with_the_option() -> None:
    found = refused(lambda x: attend(x, m6_sliding(x)), inputs(2, 16)["x"], verify_bytes=100)
    assert "verify_bytes" in found.reason
    assert '"verify_bytes": 256' in found.hint

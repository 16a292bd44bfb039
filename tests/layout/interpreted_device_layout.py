"""The kernels that list blocks in Triton's interpreter; test_device_layout.py runs this."""

from __future__ import annotations

import pytest
import torch

from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.layout.device.build import build_on_device
from sparse_compile.view import natural
from tests.layout.device_cases import CASES, DeviceCase, check


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: DeviceCase) -> None:
    check(case, torch.device("cpu"))


def test_nothing_to_attend_to() -> None:
    orders = dict(q=natural(8), kv=natural(8), device="cpu")
    lists, counts = build_on_device(
        MaskExpr(KV <= Q), batch=1, heads=1, n_q=20, n_kv=0, transposed=False, **orders
    )
    assert counts.tolist() == [[[0, 0]] * 3]
    assert lists.index.shape == (1, 0)
    lists, counts = build_on_device(
        MaskExpr(KV <= Q), batch=1, heads=1, n_q=20, n_kv=0, transposed=True, **orders
    )
    assert counts.shape == (1, 0, 2)
    assert lists.start.tolist() == [0]

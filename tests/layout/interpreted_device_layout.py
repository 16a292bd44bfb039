"""The kernels that list blocks in Triton's interpreter; test_device_layout.py runs this."""

from __future__ import annotations

import pytest
import torch

from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.layout import trusted
from sparse_compile.layout.device.build import DeviceProblem, build_on_device
from sparse_compile.layout.superset import Problem
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


WINDOW = MaskExpr((KV <= Q) & (Q - KV < 20))
CPU = torch.device("cpu")


def window(n: int) -> Problem:
    return Problem.of(WINDOW, (), 1, 1, (n, n), (8, 8))


def test_kernels_are_tried_before_they_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trusted, "_TRUSTED", {})
    problem = window(100)
    layout = trusted.device_layout(problem, WINDOW, [], CPU)
    assert list(trusted._TRUSTED.values()) == [True]
    assert torch.equal(layout.kinds(), trusted._by_cpu(problem, []).kinds())
    assert layout.rows.room is not None
    assert layout.cols.room is not None


def test_kernels_that_are_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trusted, "_TRUSTED", {})
    rows = DeviceProblem.rows

    def wrong(self: DeviceProblem) -> object:
        built = rows(self)
        built.lists.index[0, 0] += 1
        return built

    monkeypatch.setattr(DeviceProblem, "rows", wrong)
    problem = window(100)
    with pytest.warns(UserWarning, match="the CPU lists them"):
        layout = trusted.device_layout(problem, WINDOW, [], CPU)
    assert torch.equal(layout.kinds(), trusted._by_cpu(problem, []).kinds())
    assert layout.rows.room is not None
    assert layout.cols.room is not None

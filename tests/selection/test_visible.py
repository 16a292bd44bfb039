"""What a static mask may show to runs of queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparse_compile import patterns as P
from sparse_compile.selection.visible import EVERYTHING, Visible


@pytest.mark.parametrize(
    ("mask", "first", "end", "wanted"),
    [
        (None, 0, 10, 5000),
        (P.Causal(), 0, 10, 1024),
        (P.Causal(), 0, 1500, 2048),
        (P.Causal(), 3000, 4097, 5000),
        (P.Causal(), 3000, 4096, 4096),
        (P.SlidingWindow(100, 0), 0, 2000, 2048),
        (P.All(), 0, 10, 5000),
    ],
    ids=str,
)
def test_columns_hold_all_that_may_be_seen(mask: Any, first: int, end: int, wanted: int) -> None:
    expr = EVERYTHING if mask is None else mask.bound().expr
    visible = Visible(expr, [], [], 1, 1, 5000, 5000, 1, 1, torch.device("cpu"))
    columns = visible.columns(first, end)
    assert columns == wanted
    assert not visible.verdict(first, end)[1][..., columns:].any()

"""The kernels for selected keys, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.triton import calls
from sparse_compile.codegen.triton.selected import executor
from sparse_compile.errors import BadShape
from tests.selection.cases import Case, check_executor

pytestmark = pytest.mark.usefixtures("interpreted_kernels")

SMALL = dict(batch=1, n_q=40, n_kv=40)
CASES = [
    Case("blocks of 16", **SMALL),
    Case("tokens", unit_kv=1, most=20, **SMALL),
    Case("blocks of 64", unit_kv=64, batch=1, n_q=33, n_kv=150, q_heads=2),
    Case("queries in blocks", unit_q=16, unit_kv=32, **SMALL),
    Case("groups of 3, lists shared", q_heads=12, kv_heads=4, lists=2, **SMALL),
    Case("a list for each query head", lists=4, **SMALL),
    Case("negative scale", scale=-0.3, **SMALL),
    Case("scale of zero", scale=0.0, **SMALL),
    Case("latent keys", dim=272, value_dim=256, shared=True, unit_kv=1, **SMALL),
    Case("wide heads", dim=300, value_dim=80, unit_kv=16, **SMALL),
    Case("wide values, all pick one", dim=48, value_dim=80, how="one", **SMALL),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case) -> None:
    check_executor(executor, case, torch.device("cpu"), torch.float32)


def test_half_precision() -> None:
    check_executor(executor, CASES[0], torch.device("cpu"), torch.bfloat16)


def test_keys_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "PREPARED", {})
    monkeypatch.setattr(executor, "parts_of", lambda launch: 3)
    check_executor(executor, CASES[0], torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[3], CASES[5], CASES[6]], ids=str)
def test_keys_outermost(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "PREPARED", {})
    monkeypatch.setattr(executor, "is_by_key", lambda launch: True)
    monkeypatch.setattr(executor, "_STRETCH", (16, 16))
    monkeypatch.setattr(executor, "_ENTRIES", 8)
    check_executor(executor, case, torch.device("cpu"), torch.float32)


def test_more_than_can_be_numbered() -> None:
    case = CASES[0]
    *inputs, _ = case.operands()
    chosen = case.selection()
    many = chosen.index[..., :1].expand(1, 2, 40, 1 << 26)
    call = AttentionCall(*inputs, [], [], [many, chosen.count], 1.0, case.spec)
    with pytest.raises(BadShape, match="2 \\*\\* 31"):
        executor.forward(call)

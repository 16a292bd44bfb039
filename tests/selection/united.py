"""Which kernel wrote the forward: that over unions of lists, or that by query."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.triton import calls
from sparse_compile.codegen.triton.selected import executor, united
from sparse_compile.expr import MaskExpr
from tests.selection.cases import Case, eager

#: What makes the device decide for one, whatever the lists are.
COSTS = {"union": (1, 0), "query": (0, 1)}

_SHARED: dict[str, Any] = dict(q_heads=16, kv_heads=1, lists=1, batch=1, n_q=42, n_kv=200)
_SHARED |= dict(mask=MaskExpr(sympy.true), most=2)
#: Problems whose lists decide.
DECIDED = [
    (Case("equal lists", how="one", **_SHARED), "union"),
    (Case("lists apart", how="apart", **_SHARED), "query"),
]


def writers(case: Case, device: torch.device, dtype: torch.dtype) -> set[str]:
    """Run the forward, compare it with fp64, and say which kernels wrote.

    As if the problem were large; "query alone" where unions were not tried.
    """
    q, k, v = (t.to(device) for t in case.operands(dtype)[:3])
    chosen = case.selection()
    lists = chosen.index.to(device), chosen.count.to(device)
    call = AttentionCall(q, k, v, [], [], lists, case.factor, case.spec)
    found: set[str] = set()
    with pytest.MonkeyPatch.context() as patched:
        _watch(patched, found)
        out, lse = executor.forward(call)
    wanted, wanted_lse = (t.detach().to(device) for t in case.expected(dtype)[:2])
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-4, atol=1e-4)
    operands = [t.to(device) for t in case.operands(dtype)]
    theirs = eager(case, operands, case.dense_mask().to(device))[0]
    error, allowed = (float((t.detach().double() - wanted).norm()) for t in (out, theirs))
    exact = 1e-5 * float(wanted.norm())
    assert error <= (exact if dtype == torch.float32 else 1.1 * allowed + exact)
    return found


def _watch(patched: pytest.MonkeyPatch, found: set[str]) -> None:
    """Note who changes the output, which is poisoned before."""
    union, query = executor._by_union, executor._by_query

    def by_unions(launch: Any, out: Tensor, lse: Tensor) -> Tensor:
        out.fill_(7.0)
        balance = union(launch, out, lse)
        if not bool((out == 7.0).all()):
            found.add("union")
        return balance

    def by_query(launch: Any, out: Tensor, lse: Tensor, parts: int, *balance: Tensor) -> None:
        before = out.clone()
        query(launch, out, lse, parts, *balance)
        if not balance:
            found.add("query alone")
        elif not torch.equal(out, before):
            found.add("query")

    # Calls of the same shapes may have found their way already.
    patched.setattr(calls, "PREPARED", {})
    patched.setattr(united, "is_large", lambda launch: True)
    patched.setattr(executor, "_by_union", by_unions)
    patched.setattr(executor, "_by_query", by_query)
    patched.setattr(executor, "parts_of", lambda launch: 1)

"""Blocks that a selection names, through the kernels of blocks: cases, and their check."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.expr import KV, B, H, MaskExpr, Q, table
from sparse_compile.layout import unpack
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.ops import LAYOUT
from sparse_compile.spec import AttentionSpec
from tests.selection.cases import Case, eager

DOCUMENTS = MaskExpr((KV <= Q) & sympy.Eq(table(0)(B, Q), table(0)(B, KV)), ("int64",))
BY_HEAD = MaskExpr((KV <= Q) & (Q - KV < sympy.Piecewise((150, sympy.Eq(H, 1)), (300, True))))


@dataclass(frozen=True)
class Listed(Case):
    """Units of both sides are blocks."""

    unit_q: int = 64
    unit_kv: int = 64
    n_q: int = 300
    n_kv: int = 300

    def tables(self, device: torch.device) -> list[Tensor]:
        """Documents of 120 tokens, shifted in the second batch entry, where the mask reads them."""
        if not self.mask.tables:
            return []
        token = torch.arange(max(self.n_q, self.n_kv), device=device)
        return [torch.stack([(token + 70 * b) // 120 for b in range(self.batch)])]

    def dense_mask(self) -> Tensor:
        """Selected, and allowed by the mask."""
        if not self.mask.tables:
            return super().dense_mask()
        (documents,) = self.tables(torch.device("cpu"))
        same = documents[:, None, : self.n_q, None] == documents[:, None, None, : self.n_kv]
        return replace(self, mask=MaskExpr(KV <= Q)).dense_mask() & same

    @property
    def blocks(self) -> AttentionSpec:
        """What runs."""
        return AttentionSpec.of_listed_blocks(self.mask, self.unit_q, self.unit_kv)

    def packed(self, device: torch.device) -> list[Tensor]:
        """The layout, as the operator makes it."""
        chosen = self.selection()
        lists = [chosen.index.to(device), chosen.count.to(device)]
        shape = self.batch, self.q_heads, self.n_q, self.n_kv, self.kv_heads
        made: list[Tensor] = LAYOUT(
            self.tables(device), "[]", [], *shape, self.blocks.text, device, lists
        )
        return made


#: What is long is small otherwise: the interpreter takes its time for each tile.
LONG = dict(batch=1, q_heads=2, kv_heads=1, lists=1)
LISTED = [
    Listed("blocks of 64"),
    Listed("blocks of 128", unit_q=128, unit_kv=128, n_q=420, n_kv=420, **LONG),
    Listed("tall blocks", unit_q=128, n_q=400, n_kv=400, **LONG),
    Listed("wide blocks", unit_kv=128, n_q=400, n_kv=400, **LONG),
    Listed("no mask", mask=MaskExpr(sympy.true), n_q=130, n_kv=400, batch=1),
    Listed("documents", mask=DOCUMENTS),
    Listed("mask by head", mask=BY_HEAD, batch=1),
    Listed("all pick one", how="one", batch=1),
    Listed("one list for all heads", lists=1),
    Listed("a list for each query head", lists=4, batch=1),
    Listed("wide values", dim=48, value_dim=80, batch=1),
    Listed("negative scale", scale=-0.3, batch=1),
]


def check_listed(executor: Any, case: Listed, device: torch.device, dtype: torch.dtype) -> None:
    """Forward and gradients against fp64: in half precision at most 1.1 times eager's error."""
    operands = [t.to(device) for t in case.operands(dtype)]
    *inputs, grad = operands
    tables, packed = case.tables(device), case.packed(device)
    shape = ProblemShape(case.batch, case.q_heads, case.n_q, case.n_kv)
    layout = unpack(case.blocks, packed, shape, tables=tables)
    call = AttentionCall(*inputs, tables, [], [], case.factor, case.blocks, layout=layout)
    out, lse = executor.forward(call)
    found = [out, *executor.backward(call, AttentionResult(out, lse, grad))]
    wanted_out, wanted_lse, *wanted_grads = (t.to(device) for t in case.expected(dtype))
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-4, atol=1e-4)
    theirs = eager(case, operands, case.dense_mask().to(device))
    for mine, eagers, wanted in zip(found, theirs, [wanted_out, *wanted_grads], strict=True):
        error, allowed = (float((t.double() - wanted).norm()) for t in (mine, eagers))
        exact = 1e-5 * float(wanted.norm())
        assert error <= (exact if dtype == torch.float32 else 1.1 * allowed + exact)

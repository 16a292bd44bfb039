"""Selections to test attention with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor

from sparse_compile import reference
from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.expr import (
    KV,
    H,
    MaskExpr,
    Q,
    ScoreData,
    ScoreProgram,
    evaluate,
    evaluate_score,
)
from sparse_compile.selection import Selection, canonical
from sparse_compile.spec import AttentionSpec

CAUSAL = MaskExpr(KV <= Q)


@dataclass(frozen=True)
class Case:
    """A problem: heads and lengths, the units, and how many units each row selects."""

    name: str
    q_heads: int = 4
    kv_heads: int = 2
    lists: int = 2
    n_q: int = 100
    n_kv: int = 100
    dim: int = 32
    value_dim: int = 32
    unit_q: int = 1
    unit_kv: int = 16
    most: int = 3
    batch: int = 2
    mask: MaskExpr = CAUSAL
    how: str = "random"
    scale: float | None = None
    shared: bool = False
    score: ScoreProgram | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def factor(self) -> float:
        """On the scores."""
        return self.dim**-0.5 if self.scale is None else self.scale

    def index(self) -> Tensor:
        """Lists of units, not yet canonical."""
        rows, units = -(-self.n_q // self.unit_q), -(-self.n_kv // self.unit_kv)
        shape = (self.batch, self.lists, rows, self.most)
        generator = torch.Generator().manual_seed(1)
        if self.how == "one":
            return torch.full(shape, units // 2)
        if self.how == "apart":
            # No two neighbours have a unit in common, as long as there are units.
            return (torch.arange(rows * self.most) % units).view(rows, self.most).expand(shape)
        # Pads, repeated numbers and numbers out of range among them.
        return torch.randint(-2, units + 1, shape, generator=generator)

    def selection(self) -> Selection:
        index, count = canonical(self.index(), -(-self.n_kv // self.unit_kv))
        return Selection(index, count, self.unit_q, self.unit_kv)

    def operands(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """q, k, v and the gradient of the result."""
        generator = torch.Generator().manual_seed(0)
        shapes = (
            (self.batch, self.q_heads, self.n_q, self.dim),
            (self.batch, self.kv_heads, self.n_kv, self.dim),
            (self.batch, self.kv_heads, self.n_kv, self.value_dim),
            (self.batch, self.q_heads, self.n_q, self.value_dim),
        )
        made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        return self.with_shared(made) if self.shared else made

    def with_shared(self, operands: list[Tensor]) -> list[Tensor]:
        """The operands with the first features of the keys as values, in the same memory."""
        q, k, _, grad = operands
        return [q, k, k[..., : self.value_dim], grad]

    @property
    def spec(self) -> AttentionSpec:
        return replace(
            AttentionSpec.of_units(self.mask, self.unit_q, self.unit_kv), score=self.score
        )

    def dense_mask(self) -> Tensor:
        """bool [B, Hq, n_q, n_kv]: selected, and allowed by the mask."""
        chosen = self.selection().dense(self.n_q, self.n_kv)
        chosen = chosen.repeat_interleave(self.q_heads // self.lists, 1)
        return chosen & evaluate(self.mask, self._where(), self.n_q, self.n_kv, [], [])

    def _where(self) -> dict[str, Tensor]:
        return {
            "b": torch.arange(self.batch).view(-1, 1, 1, 1),
            "h": torch.arange(self.q_heads).view(-1, 1, 1),
            "q": torch.arange(self.n_q)[:, None],
            "kv": torch.arange(self.n_kv),
        }

    def scored(self, products: Tensor) -> Tensor:
        """Scores from scaled products [B, Hq, n_q, n_kv]."""
        if self.score is None:
            return products
        where = {name: value.to(products.device) for name, value in self._where().items()}
        return evaluate_score(self.score, products, ScoreData(where, self.n_q, self.n_kv))

    def expected(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """out, lse, dq, dk and dv by the fp64 reference, for operands rounded to ``dtype``."""
        *inputs, grad = self.operands(dtype)
        q, k, v = (t.double().requires_grad_() for t in inputs)
        out, lse = reference.attention(q, k, v, self.dense_mask(), self.factor, score=self.scored)
        return [out, lse, *torch.autograd.grad(out, (q, k, v), grad.double())]


PER_HEAD = MaskExpr((KV <= Q) & (Q - KV < sympy.Piecewise((40, sympy.Eq(H, 1)), (90, True))))

LATENT: dict[str, Any] = dict(dim=576, value_dim=512, shared=True)

CASES = [
    Case("blocks of 16"),
    Case("tokens", unit_kv=1, most=20),
    Case("blocks of 64", unit_kv=64, n_q=200, n_kv=200),
    Case("blocks of 128", unit_kv=128, n_q=300, n_kv=300, most=2),
    Case("no mask", mask=MaskExpr(sympy.true), n_q=70, n_kv=130),
    Case("mask by head", mask=PER_HEAD),
    Case("all pick one", how="one"),
    Case("queries in blocks", unit_q=64, unit_kv=64, n_q=200, n_kv=200),
    Case("queries in short blocks", unit_q=16, unit_kv=32),
    Case("one list for all heads", lists=1),
    Case("a list for each query head", lists=4),
    Case("groups of 7", q_heads=14, kv_heads=2, lists=2),
    Case("groups of 3, lists shared", q_heads=12, kv_heads=4, lists=2),
    Case("groups of 16", q_heads=16, kv_heads=1, lists=1),
    Case("wide values", dim=48, value_dim=80),
    Case("one query", n_q=1, n_kv=100, mask=MaskExpr(sympy.true)),
    Case("negative scale", scale=-0.3),
    Case("scale of zero", scale=0.0),
    Case("latent keys", q_heads=16, kv_heads=1, lists=1, unit_kv=1, most=40, **LATENT),
    Case("latent keys in blocks", q_heads=70, kv_heads=1, lists=1, n_q=30, **LATENT),
    Case("wide heads", dim=300, value_dim=500, unit_kv=32),
    Case("few queries at the end", n_q=5, n_kv=100, mask=MaskExpr(KV <= Q + 95)),
]


def eager(case: Case, operands: list[Tensor], mask: Tensor) -> list[Tensor]:
    """out, dq, dk and dv by dense attention in the precision of the operands."""
    *inputs, grad = operands
    q, k, v = (t.detach().requires_grad_() for t in inputs)
    group = case.q_heads // case.kv_heads
    scores = case.scored((q @ k.repeat_interleave(group, 1).mT) * case.factor)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    out = weights.nan_to_num(0) @ v.repeat_interleave(group, 1)
    return [out, *(t.nan_to_num(0) for t in torch.autograd.grad(out, (q, k, v), grad))]


def check_executor(executor: Any, case: Case, device: torch.device, dtype: torch.dtype) -> None:
    """Forward and gradients against fp64: in half precision at most 1.1 times eager's error."""
    operands = [t.to(device) for t in case.operands(dtype)]
    *inputs, grad = operands = case.with_shared(operands) if case.shared else operands
    chosen = case.selection()
    lists = chosen.index.to(device), chosen.count.to(device)
    call = AttentionCall(*inputs, [], [], lists, case.factor, case.spec)
    out, lse = executor.forward(call)
    found = [out, *executor.backward(call, AttentionResult(out, lse, grad))]
    wanted_out, wanted_lse, *wanted_grads = (t.to(device) for t in case.expected(dtype))
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-4, atol=1e-4)
    theirs = eager(case, operands, case.dense_mask().to(device))
    for mine, eagers, wanted in zip(found, theirs, [wanted_out, *wanted_grads], strict=True):
        error, allowed = (float((t.double() - wanted).norm()) for t in (mine, eagers))
        exact = 1e-5 * float(wanted.norm())
        assert error <= (exact if dtype == torch.float32 else 1.1 * allowed + exact)

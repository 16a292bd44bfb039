"""Pooled attention maps against the dense definition in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile import patterns as P
from sparse_compile import reference
from sparse_compile.errors import BadPattern, BadShape, PatternMisuse
from sparse_compile.expr import KV, H, MaskExpr, Q, evaluate
from sparse_compile.selection import allowed_units, pooled_attention
from sparse_compile.selection.train import distill

CAUSAL = MaskExpr(KV <= Q)
LATE = MaskExpr(KV + 20 <= Q)
BY_HEAD = MaskExpr((KV <= Q) & (Q - KV < sympy.Piecewise((7, sympy.Eq(H, 1)), (30, True))))


@dataclass(frozen=True)
class Problem:
    group: int = 1
    kv_heads: int = 2
    n_q: int = 50
    n_kv: int = 50
    unit_q: int = 8
    unit_kv: int = 16
    lists: int = 2
    mask: MaskExpr = CAUSAL
    dim: int = 16

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    def operands(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(2, self.heads, self.n_q, self.dim, generator=generator)
        return q, torch.randn(2, self.kv_heads, self.n_kv, self.dim, generator=generator)

    def keep(self) -> Tensor:
        where = {
            "b": torch.arange(2).view(-1, 1, 1, 1),
            "h": torch.arange(self.heads).view(-1, 1, 1),
            "q": torch.arange(self.n_q)[:, None],
            "kv": torch.arange(self.n_kv),
        }
        keep = evaluate(self.mask, where, self.n_q, self.n_kv)
        return keep.expand(2, self.heads, self.n_q, self.n_kv)

    def lse(self) -> Tensor:
        q, k = self.operands()
        return reference.attention(q, k, k, self.keep())[1]

    def dense(self, reduce: str) -> Tensor:
        """The definition, pair of units by pair of units."""
        q, k = (t.double() for t in self.operands())
        score = q @ k.repeat_interleave(self.group, 1).mT * self.dim**-0.5
        score = score.masked_fill(~self.keep(), -torch.inf)
        weight = score.softmax(-1).nan_to_num(0)
        rows = []
        for some, seen in zip(
            weight.split(self.unit_q, 2), self.keep().split(self.unit_q, 2), strict=True
        ):
            parts = some.split(self.unit_kv, 3)
            if reduce == "max":
                row = torch.stack([part.amax((2, 3)) for part in parts], -1)
            else:
                attends = seen.any(-1).sum(-1)[..., None].clamp_min(1)
                row = torch.stack([part.sum((2, 3)) for part in parts], -1) / attends
            rows.append(row)
        by_list = torch.stack(rows, 2).unflatten(1, (self.lists, -1))
        return by_list.amax(2) if reduce == "max" else by_list.mean(2)

    def options(self) -> dict[str, object]:
        units = {"unit_q": self.unit_q, "unit_kv": self.unit_kv}
        return {**units, "mask": self.mask, "lists": self.lists}


PROBLEMS = {
    "plain": Problem(mask=MaskExpr(sympy.true)),
    "causal": Problem(),
    "groups of 2": Problem(group=2),
    "groups of 3": Problem(group=3),
    "groups of 7": Problem(group=7),
    "a list for each head": Problem(group=3, lists=6),
    "one list": Problem(group=3, lists=1),
    "one query a unit": Problem(unit_q=1),
    "tokens": Problem(unit_q=1, unit_kv=1),
    "longer keys": Problem(n_q=30, n_kv=77, mask=MaskExpr(KV <= Q + 47)),
    "even lengths": Problem(n_q=48, n_kv=64),
    "units longer than all": Problem(unit_q=64, unit_kv=128),
    "rows without keys": Problem(mask=LATE),
    "mask by head": Problem(group=2, mask=BY_HEAD),
}


@pytest.mark.parametrize("reduce", ["max", "sum"])
@pytest.mark.parametrize("given_lse", [True, False])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_equals_the_dense_definition(
    problem: Problem, given_lse: bool, reduce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "MOST", 5000)  # several chunks
    lse = problem.lse() if given_lse else None
    found = pooled_attention(*problem.operands(), lse, reduce=reduce, **problem.options())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), problem.dense(reduce), rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    n_q=st.integers(1, 40),
    n_kv=st.integers(1, 40),
    unit_q=st.integers(1, 12),
    unit_kv=st.integers(1, 12),
    group=st.integers(1, 3),
)
def test_any_units(n_q: int, n_kv: int, unit_q: int, unit_kv: int, group: int) -> None:
    problem = Problem(group, 1, n_q, n_kv, unit_q, unit_kv, lists=1)
    for reduce in ("max", "sum"):
        found = pooled_attention(*problem.operands(), reduce=reduce, **problem.options())
        torch.testing.assert_close(found.double(), problem.dense(reduce), rtol=1e-5, atol=1e-6)


def test_rows_of_the_mass_sum_to_one() -> None:
    problem = Problem(group=3)
    found = pooled_attention(*problem.operands(), reduce="sum", **problem.options())
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:3]))


def test_pattern_in_the_place_of_a_mask() -> None:
    q, k = Problem().operands()
    by_mask = pooled_attention(q, k, mask=CAUSAL, unit_kv=16)
    assert torch.equal(pooled_attention(q, k, mask=P.Causal(), unit_kv=16), by_mask)


def test_pattern_with_a_table() -> None:
    q, k = Problem().operands()
    documents = torch.arange(50) // 20
    pattern = P.Causal() & P.Documents(documents)
    found = pooled_attention(q, k, mask=pattern, unit_kv=10, reduce="sum")
    other = documents[:, None] != documents[::10]
    assert (found[:, :, other] == 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:3]))


def test_half_precision_is_computed_in_fp32() -> None:
    q, k = (t.bfloat16() for t in Problem().operands())
    found = pooled_attention(q, k, mask=CAUSAL, unit_kv=16)
    wanted = pooled_attention(q.float(), k.float(), mask=CAUSAL, unit_kv=16)
    torch.testing.assert_close(found, wanted)


def test_never_more_scores_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "MOST", 20_000)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    q = torch.randn(1, 2, 1000, 8)
    with Watch():
        pooled_attention(q, q, unit_q=10, unit_kv=50, mask=CAUSAL)
    assert largest <= 20_000


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_allowed_units(problem: Problem) -> None:
    found = allowed_units(*problem.operands(), **problem.options())
    wanted = torch.stack(
        [
            torch.stack([part.any((2, 3)) for part in some.split(problem.unit_kv, 3)], -1)
            for some in problem.keep().split(problem.unit_q, 2)
        ],
        2,
    ).unflatten(1, (problem.lists, -1))
    assert torch.equal(found.expand_as(wanted.any(2)), wanted.any(2))


def test_mistakes() -> None:
    q, k = Problem(group=3).operands()
    with pytest.raises(BadPattern, match="reduce is 'mean'"):
        pooled_attention(q, k, reduce="mean")
    with pytest.raises(BadPattern, match="unit_kv is 0"):
        pooled_attention(q, k, unit_kv=0)
    with pytest.raises(BadShape, match="4 lists for 6 query heads"):
        pooled_attention(q, k, lists=4)
    with pytest.raises(BadShape, match="Hkv divides Hq"):
        pooled_attention(q[:, :5], k)
    with pytest.raises(BadShape, match="log-sum-exp"):
        pooled_attention(q, k, torch.zeros(2, 2, 50))
    with pytest.raises(PatternMisuse, match="no mask of this kind"):
        pooled_attention(q, k, mask=torch.ones(50, 50).bool())  # type: ignore[arg-type]

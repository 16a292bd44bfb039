"""The CPU executor against the meaning of attention, over masks, shapes and dtypes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_compile import reference
from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.cpu import executor, flash
from sparse_compile.expr import (
    KV,
    B,
    FloorDiv,
    FloorMod,
    H,
    MaskExpr,
    Q,
    evaluate,
    size_symbol,
    table,
)
from sparse_compile.layout import BlockLayout, BlockLists, Layout, build_layout
from sparse_compile.layout.superset import Problem, ProblemShape
from sparse_compile.spec import AttentionSpec
from sparse_compile.spec.view import natural
from tests.tolerance import assert_close_as_eager, relative_error

T0, S0 = table(0), size_symbol(0)
DOCUMENTS = MaskExpr(sympy.Eq(T0(B, Q), T0(B, KV)), ("int64",))


def documents(n: int, batch: int = 2) -> Tensor:
    starts = torch.rand(batch, n, generator=torch.Generator().manual_seed(5)) < 0.03
    return starts.cumsum(1)


@dataclass(frozen=True)
class Case:
    mask: MaskExpr
    n_q: int = 150
    n_kv: int = 150
    batch: int = 2
    kv_heads: int = 2
    group: int = 1
    dim: int = 32
    value_dim: int = 32
    tables: tuple[Tensor, ...] = ()
    sizes: tuple[int, ...] = ()
    block: int = 32

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.dim)

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.mask, block_q=self.block, block_kv=self.block)

    @property
    def layout(self) -> BlockLayout:
        return build_layout(
            Problem.of(
                self.mask,
                ProblemShape(self.batch, self.kv_heads * self.group, self.n_q, self.n_kv),
                (self.block, self.block),
                self.sizes,
            ),
            self.tables,
        )

    def dense_mask(self) -> Tensor:
        heads = self.kv_heads * self.group
        where = {
            "b": torch.arange(self.batch).view(-1, 1, 1, 1),
            "h": torch.arange(heads).view(-1, 1, 1),
            "q": torch.arange(self.n_q).view(-1, 1),
            "kv": torch.arange(self.n_kv),
        }
        mask = evaluate(self.mask, where, self.n_q, self.n_kv, self.tables, self.sizes)
        return mask.expand(self.batch, heads, self.n_q, self.n_kv)

    def operands(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and the gradient of the output, stored as models do: [B, N, H, D]."""
        generator = torch.Generator().manual_seed(0)
        heads = self.kv_heads * self.group
        shapes = (
            (self.batch, self.n_q, heads, self.dim),
            (self.batch, self.n_kv, self.kv_heads, self.dim),
            (self.batch, self.n_kv, self.kv_heads, self.value_dim),
            (self.batch, self.n_q, heads, self.value_dim),
        )
        tensors = (torch.randn(shape, generator=generator) for shape in shapes)
        return [x.to(dtype).transpose(1, 2) for x in tensors]


def run(case: Case, operands: Sequence[Tensor], grad_lse: Tensor | None) -> list[Tensor]:
    """out, lse, dq, dk, dv of the executor."""
    call = call_of(case, operands)
    out, lse = executor.forward(call)
    grads = executor.backward(call, AttentionResult(out, lse, operands[3], grad_lse))
    return [out, lse, *grads]


def call_of(
    case: Case, operands: Sequence[Tensor], layout: BlockLayout | None = None
) -> AttentionCall:
    """The call of a case, with its own blocks or others."""
    blocks = (layout or case.layout,)
    made = Layout(case.spec, blocks, case.batch, case.kv_heads * case.group)
    data = case.tables, case.sizes, (), case.scale, case.spec
    return AttentionCall(*operands[:3], *data, layout=made)


def truth(case: Case, operands: Sequence[Tensor], grad_lse: Tensor | None) -> list[Tensor]:
    leaves = [x.double().requires_grad_() for x in operands[:3]]
    mask = case.dense_mask()
    out, lse = reference.attention(*leaves, mask, case.scale)
    outputs, grads = [out], [operands[3].double()]
    if grad_lse is not None:
        # The reference detaches its lse when some row is empty.
        scores = leaves[0] @ leaves[1].repeat_interleave(case.group, 1).mT * case.scale
        rows = mask.any(-1)
        outputs.append(scores.masked_fill(~mask, -1e300).logsumexp(-1).masked_fill(~rows, 0.0))
        grads.append(grad_lse.double())
    return [out.detach(), lse.detach(), *torch.autograd.grad(outputs, leaves, grads)]


def eager(case: Case, operands: Sequence[Tensor], grad_lse: Tensor | None) -> list[Tensor]:
    """The dense program in the dtype of the operands."""
    q, k, v = (x.detach().clone().requires_grad_() for x in operands[:3])
    mask = case.dense_mask()
    keys, values = (x.repeat_interleave(case.group, 1) for x in (k, v))
    scores = (q @ keys.mT * case.scale).masked_fill(~mask, torch.finfo(q.dtype).min)
    rows = mask.any(-1)
    out = (scores.softmax(-1) @ values).masked_fill(~rows[..., None], 0.0)
    lse = scores.logsumexp(-1).masked_fill(~rows, 0.0)
    outputs, grads = [out], [operands[3]]
    if grad_lse is not None:
        outputs, grads = [out, lse], [operands[3], grad_lse.to(q.dtype)]
    return [out.detach(), lse.detach(), *torch.autograd.grad(outputs, (q, k, v), grads)]


def check(case: Case, dtype: torch.dtype = torch.float32, with_lse: bool = False) -> None:
    operands = case.operands(dtype)
    grad_lse = torch.randn(operands[0].shape[:3]) if with_lse else None
    got, want = run(case, operands, grad_lse), truth(case, operands, grad_lse)
    dense = eager(case, operands, grad_lse)
    q, k, v, _ = operands
    for name, value, like in zip(("dq", "dk", "dv"), got[2:], (q, k, v), strict=True):
        assert value.transpose(1, 2).is_contiguous(), name
        assert value.dtype == dtype, name
        assert value.shape == like.shape, name
    assert got[0].dtype == dtype
    assert got[0].transpose(1, 2).is_contiguous()
    assert got[1].dtype == torch.float32
    assert torch.equal(got[1].isneginf(), want[1].isneginf())
    # lse is fp32, but of scores that were computed in the dtype of the operands.
    got[1], want[1] = (lse.nan_to_num(neginf=0.0).to(dtype) for lse in (got[1], want[1]))
    for name, value, approximate, exact in zip(
        ("out", "lse", "dq", "dk", "dv"), got, dense, want, strict=True
    ):
        assert_close_as_eager(name, value, approximate, exact)


CAUSAL = MaskExpr(KV <= Q)
WINDOW = MaskExpr((KV <= Q) & (Q - KV < 40))
CASES = {
    "causal": Case(CAUSAL),
    "causal window": Case(WINDOW),
    "symmetric window": Case(MaskExpr(sympy.Abs(Q - KV) <= 20)),
    "strided": Case(MaskExpr(sympy.Eq(FloorMod(Q - KV, 4), 0))),
    "global columns": Case(MaskExpr((KV < 2) | ((KV <= Q) & (Q - KV < 40)))),
    "chunks": Case(MaskExpr(sympy.Eq(FloorDiv(Q, 24), FloorDiv(KV, 24)))),
    "documents": Case(DOCUMENTS, tables=(documents(150),)),
    "causal documents": Case(
        MaskExpr(sympy.And(DOCUMENTS.predicate, KV <= Q), ("int64",)),
        tables=(documents(150),),
        group=2,
    ),
    "padding": Case(
        MaskExpr(sympy.Eq(T0(B, KV), 1), ("bool",)),
        tables=(torch.arange(150) < torch.tensor([[150], [70]]),),
    ),
    "window per head": Case(
        MaskExpr((KV <= Q) & (Q - KV < T0(H)), ("int32",)),
        tables=(torch.tensor([3, 30, 60, 200], dtype=torch.int32),),
        group=2,
    ),
    "offset": Case(MaskExpr(KV <= Q + S0, n_sizes=1), n_q=40, sizes=(110,)),
    "empty rows": Case(MaskExpr((KV <= Q) & (Q >= 37) & (Q < 120))),
    "empty rows in the middle of a tile": Case(
        MaskExpr(sympy.Ne(FloorMod(Q, 5), 2) & (KV <= Q) & (Q - KV < 40))
    ),
    "empty rows between runs": Case(
        MaskExpr(sympy.Ne(FloorMod(Q, 5), 2) & ((KV < 2) | ((KV <= Q) & (Q - KV < 20)))),
        n_q=300,
        n_kv=300,
        batch=1,
    ),
    "nothing": Case(MaskExpr(KV < Q - 1000)),
    "everything": Case(MaskExpr(sympy.true)),
    "one query": Case(MaskExpr(KV <= Q + S0, n_sizes=1), n_q=1, group=3, sizes=(140,)),
    "more queries than keys": Case(WINDOW, n_kv=70),
    "fewer queries than keys": Case(WINDOW, n_q=70),
    "whole blocks": Case(WINDOW, n_q=128, n_kv=128),
    "scattered blocks": Case(
        MaskExpr(sympy.Eq(T0(FloorDiv(Q, 8), FloorDiv(KV, 8)), 1), ("bool",)),
        tables=(torch.rand(19, 19, generator=torch.Generator().manual_seed(0)) < 0.3,),
        block=8,
        group=2,
    ),
    "groups of 3": Case(WINDOW, group=3),
    "one key head": Case(WINDOW, kv_heads=1, group=4),
    "D 72": Case(WINDOW, dim=72, value_dim=72),
    "D 80": Case(WINDOW, dim=80, value_dim=80),
    "wide values": Case(WINDOW, dim=32, value_dim=48, group=2),
    "narrow values": Case(WINDOW, dim=40, value_dim=24),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_meaning(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "global columns", "empty rows", "wide values"])
def test_gradient_of_lse(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], dtype, with_lse=True)


@pytest.mark.parametrize("name", ["global columns", "scattered blocks", "wide values"])
def test_without_the_fused_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "_operators", lambda: None)
    check(CASES[name], with_lse=name == "global columns")


@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("name", ["causal window", "global columns", "documents"])
def test_any_block_shape(name: str, block: int) -> None:
    check(replace(CASES[name], block=block))


def test_double_precision() -> None:
    case = CASES["global columns"]
    operands = case.operands(torch.float64)
    got, want = run(case, operands, None), truth(case, operands, None)
    for value, exact in zip(got, want, strict=True):
        assert relative_error(value, exact) < 1e-6  # lse is fp32


def test_long_rows_in_several_runs() -> None:
    mask = MaskExpr((KV <= Q) & sympy.Ne(FloorMod(KV, 701), 3))
    check(Case(mask, n_q=1300, n_kv=1300, batch=1, kv_heads=1, dim=16, value_dim=16, block=64))


@pytest.mark.parametrize("name", ["documents", "scattered blocks", "global columns", "groups of 3"])
def test_small_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "CHUNK_SCORES", 5000)
    monkeypatch.setattr(executor, "CHUNK_BYTES", 20000)
    case = CASES[name]
    if name == "documents":
        case = replace(case, n_q=400, n_kv=400, tables=(documents(400),))
    check(case)


def all_partial(n_q: int, n_kv: int, block: int) -> BlockLayout:
    """The layout that says nothing: right for every mask."""

    def lists(lines: int, others: int) -> BlockLists:
        start = torch.arange(lines + 1) * others
        counts = torch.tensor([others, 0]).expand(1, lines, 2)
        index = torch.arange(others).repeat(lines)[None]
        return BlockLists(start.int(), counts.int(), index.int())

    rows, columns = -(-n_q // block), -(-n_kv // block)
    return BlockLayout(
        n_q, n_kv, natural(block), natural(block), 1, 1, lists(rows, columns), lists(columns, rows)
    )


def test_one_layout_serves_different_masks() -> None:
    mask = MaskExpr((KV <= Q + S0 * H + B) & (T0(KV) > 0), ("int64",), n_sizes=1)
    layout = all_partial(100, 100, 32)
    some = torch.arange(100) % 3
    for tables, size in [((some,), 3), ((some,), 4), ((some.roll(1),), 4)]:
        case = Case(mask, n_q=100, n_kv=100, group=2, tables=tables, sizes=(size,))
        operands = case.operands(torch.float32)
        out, _ = executor.forward(call_of(case, operands, layout))
        assert relative_error(out, truth(case, operands, None)[0]) < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["causal", "causal window", "strided", "global columns", "chunks"]),
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(1, 3),
)
def test_random_lengths(name: str, n_q: int, n_kv: int, group: int) -> None:
    check(replace(CASES[name], n_q=n_q, n_kv=n_kv, group=group, dim=16, value_dim=16, batch=1))


@pytest.mark.parametrize("shape", [(0, 10), (10, 0)])
def test_no_tokens(shape: tuple[int, int]) -> None:
    case = replace(CASES["causal"], n_q=shape[0], n_kv=shape[1])
    out, lse, *grads = run(case, case.operands(torch.float32), None)
    assert bool((lse == -math.inf).all())
    assert all(bool((x == 0).all()) for x in (out, *grads))


def test_gradients_are_the_same_bits_each_time() -> None:
    case = CASES["scattered blocks"]
    operands = case.operands(torch.bfloat16)
    first, second = run(case, operands, None), run(case, operands, None)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strides_do_not_matter() -> None:
    case = CASES["global columns"]
    operands = case.operands(torch.float32)
    contiguous = run(case, [x.contiguous() for x in operands], None)
    odd = run(case, [x.contiguous().mT.contiguous().mT for x in operands], None)
    for a, b, c in zip(run(case, operands, None), contiguous, odd, strict=True):
        assert relative_error(b, a.nan_to_num(neginf=0.0)) < 1e-6
        assert relative_error(c, a.nan_to_num(neginf=0.0)) < 1e-6


def test_tables_are_read_at_each_call() -> None:
    case = CASES["documents"]
    operands = case.operands(torch.float32)
    changed = case.tables[0].clone()
    first = run(replace(case, tables=(changed,)), operands, None)[0]
    changed.zero_()
    second = run(replace(case, tables=(changed,)), operands, None)[0]
    assert relative_error(second, truth(replace(case, tables=(changed,)), operands, None)[0]) < 1e-5
    assert relative_error(second, first) > 0.1


def test_nan_in_a_value_stays_where_it_may_be_seen() -> None:
    mask = MaskExpr((KV < 2) | ((KV <= Q) & (Q - KV < 8)))
    case = Case(mask, n_q=1000, n_kv=1000, batch=1, block=16)
    operands = case.operands(torch.float32)
    operands[2][:, :, 600] = math.nan
    out, _ = executor.forward(call_of(case, operands))
    poisoned = out[0, 0].isnan().any(-1)
    assert bool(poisoned[600:608].all())
    # As in dense attention, 0 * NaN is NaN: queries of the same tile share its keys.
    assert not bool(poisoned[:500].any())
    assert not bool(poisoned[700:].any())


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements of any result that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("name", ["causal", "strided"])
def test_memory_is_not_quadratic(name: str) -> None:
    n = 8192
    case = replace(CASES[name], n_q=n, n_kv=n, batch=1, kv_heads=1, dim=8, value_dim=8, block=128)
    if name == "strided":
        case = replace(case, n_q=n // 4)
    operands = case.operands(torch.float32)
    call = call_of(case, operands)
    with LargestTensor() as largest:
        out, lse = executor.forward(call)
        executor.backward(call, AttentionResult(out, lse, operands[3]))
    assert largest.numel <= case.n_q * n // 8

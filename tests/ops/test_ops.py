"""The operators: registration, fakes, validation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparse_compile.ops  # noqa: F401  # registers the operators
from sparse_compile.errors import BadShape, UnsupportedDtype
from sparse_compile.expr import KV, B, MaskExpr, Q, table
from sparse_compile.expr.nodes import size_symbol
from sparse_compile.ops.operands import check_operands
from sparse_compile.reference import attention as reference
from sparse_compile.spec import AttentionSpec, EmptyRows
from tests.tolerance import relative_error

WINDOW = AttentionSpec(MaskExpr((KV <= Q) & (Q - KV < 20)), block_q=16, block_kv=16)
DOCS = AttentionSpec(
    MaskExpr((KV <= Q) & (table(0)(B, KV) > 0), ("bool",)), EmptyRows.MEAN_ADDED, 16, 16
)
ops = torch.ops.sparse_compile


def operands(requires_grad: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 6, 50, 16), (2, 2, 50, 16), (2, 2, 50, 24)]
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


def keep() -> Tensor:
    table = torch.ones(2, 50, dtype=torch.bool)
    table[0, :7] = False
    return table


def lists_for(spec: AttentionSpec, *tables: Tensor, sizes: tuple[int, ...] = ()) -> list[Tensor]:
    args = (
        list(tables),
        "[]",
        list(sizes),
        2,
        6,
        50,
        50,
        2,
        spec.blocks.text,
        torch.device("cpu"),
        [],
    )
    return ops.layout(*args)


def packed() -> list[Tensor]:
    return lists_for(DOCS, keep())


def test_opcheck_forward() -> None:
    q, k, v = operands()
    torch.library.opcheck(
        ops.attention, (q, k, v, [], [], [], lists_for(WINDOW), 0.25, WINDOW.text)
    )
    torch.library.opcheck(ops.attention, (q, k, v, [], [keep()], [], packed(), 0.25, DOCS.text))


OFFSET = MaskExpr(KV <= Q + size_symbol(0), n_sizes=1)


@pytest.mark.parametrize("covered_by", ["blocks", "units", "both"])
def test_gradients_with_sizes(covered_by: str) -> None:
    q, k, v = operands()
    index = torch.tensor([0, 2], dtype=torch.int32).expand(2, 1, 50, 2).contiguous()
    lists = [index, torch.full((2, 1, 50), 2, dtype=torch.int32)]
    own = AttentionSpec(OFFSET, block_q=16, block_kv=16)
    i = torch.arange(50)
    past, listed = i[None] <= i[:, None] + 7, (i // 16) % 2 == 0
    if covered_by == "blocks":
        blocks = lists_for(own, sizes=(7,))
        mask, out = past, ops.attention(q, k, v, [], [], [7], blocks, 0.25, own.text)[0]
    elif covered_by == "units":
        mask = past & listed
        chosen = AttentionSpec.of_units(OFFSET, 1, 16)
        out = ops.attention(q, k, v, [], [], [7], lists, 0.25, chosen.text)[0]
    else:
        rest = MaskExpr((KV > Q + size_symbol(0)) & (KV <= Q + 20), n_sizes=1)
        mask = past & listed | ~past & (i[None] <= i[:, None] + 20)
        both = AttentionSpec(rest, block_q=16, block_kv=16).with_units(OFFSET, 1, 16)
        lists = [*lists_for(both, sizes=(7,)), *lists]
        out = ops.attention(q, k, v, [], [], [7], lists, 0.25, both.text)[0]
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    wanted = reference(*exact, mask, 0.25)[0]
    weight = torch.randn(out.shape)
    grads = torch.autograd.grad(out, (q, k, v), weight)
    wanted_grads = torch.autograd.grad(wanted, exact, weight.double())
    for found, its in zip([out, *grads], [wanted, *wanted_grads], strict=True):
        assert relative_error(found, its) < 1e-5


def test_opcheck_backward_and_layout() -> None:
    q, k, v = operands(requires_grad=False)
    call = (q, k, v, [], [keep()], [], packed(), 0.25, DOCS.text)
    out, lse = ops.attention(*call)
    torch.library.opcheck(
        ops.attention_backward, (torch.randn_like(out), None, out, lse, *call, [])
    )
    for spec, tables in ((DOCS, [keep()]), (WINDOW, [])):
        shape = 2, 6, 50, 50, 2
        layout_args = (tables, "[]", [], *shape, spec.text, torch.device("cpu"), [])
        torch.library.opcheck(ops.layout, layout_args)


def test_lse_is_differentiable() -> None:
    q, k, v = operands()
    out, lse = ops.attention(q, k, v, [], [], [], lists_for(WINDOW), 0.25, WINDOW.text)
    i = torch.arange(50)
    mask = (i[None] <= i[:, None]) & (i[:, None] - i[None] < 20)
    exact, exact_lse = reference(q, k, v, mask, 0.25)
    assert relative_error(lse, exact_lse) < 1e-6
    weights = torch.randn_like(lse)
    ours = torch.autograd.grad((lse * weights).sum() + out.sum(), (q, k, v))
    truth = torch.autograd.grad((exact_lse * weights).sum() + exact.sum(), (q, k, v))
    for mine, theirs in zip(ours, truth, strict=True):
        assert relative_error(mine, theirs) <= 1e-5


def test_empty_rows_policy_reaches_the_operator() -> None:
    q, k, v = operands()
    out, lse = ops.attention(q, k, v, [], [keep()], [], packed(), 0.25, DOCS.text)
    i = torch.arange(50)
    mask = (i[None] <= i[:, None])[None, None] & keep()[:, None, None]
    exact, _ = reference(q, k, v, mask, 0.25, "mean_added")
    assert bool(lse[0, :, :7].isneginf().all())
    assert relative_error(out, exact) <= 1e-5
    ours = torch.autograd.grad(out.square().sum(), (q, k, v))
    truth = torch.autograd.grad(exact.square().sum(), (q, k, v))
    for mine, theirs in zip(ours, truth, strict=True):
        assert relative_error(mine, theirs) <= 1e-5


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 5, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16)), "5 query heads cannot share 2 key"),
        (((1, 2, 8, 16), (1, 2, 8, 8), (1, 2, 8, 8)), "must agree"),
        (((2, 8, 16), (2, 8, 16), (2, 8, 16)), "unsqueeze"),
        (((1, 1, 8, 300), (1, 1, 8, 300), (1, 1, 8, 300)), "1 to 256"),
    ],
)
def test_bad_shapes_are_named(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(BadShape, match=message):
        check_operands(*(torch.zeros(shape) for shape in shapes))


def test_bad_dtypes_are_named() -> None:
    q = torch.zeros(1, 1, 8, 16, dtype=torch.int32)
    with pytest.raises(UnsupportedDtype, match="Cast q, k and v"):
        check_operands(q, q, q)
    half = torch.zeros(1, 1, 8, 16, dtype=torch.float16)
    with pytest.raises(BadShape, match="one dtype"):
        check_operands(half, half, half.float())
    with pytest.raises(BadShape, match="one dtype"):
        ops.attention(half, half, half.float(), [], [], [], [], 0.25, WINDOW.text)

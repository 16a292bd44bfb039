"""Blocks that a selection names: their layout, and attention to them on the CPU."""

from __future__ import annotations

import pytest
import torch

from sparse_compile.codegen.cpu import views
from sparse_compile.layout import FULL, unpack
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.ops import ATTENTION, LAYOUT
from sparse_compile.spec import are_blocks
from tests.selection.listed_cases import LISTED, Listed, check_listed

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", LISTED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_dense_definition(case: Listed, dtype: torch.dtype) -> None:
    check_listed(views, case, CPU, dtype)


@pytest.mark.parametrize("case", LISTED, ids=str)
def test_lists_hold_what_is_selected_and_allowed(case: Listed) -> None:
    shape = ProblemShape(case.batch, case.q_heads, case.n_q, case.n_kv)
    (view,) = unpack(case.blocks, case.packed(CPU), shape, tables=case.tables(CPU)).views
    mask, kinds = case.dense_mask(), view.kinds()
    for c in range(view.classes):
        allowed = mask[c // case.q_heads, c % case.q_heads]
        for i, row in enumerate(allowed.split(case.unit_q)):
            for j, block in enumerate(row.split(case.unit_kv, 1)):
                whole = block.shape == (case.unit_q, case.unit_kv) and bool(block.all())
                assert kinds[c, i, j] or not block.any()
                assert whole or kinds[c, i, j] != FULL
        by_row = zip(*(part.tolist() for part in view.rows.entries(c)), strict=True)
        by_column = zip(*(part.tolist() for part in view.cols.entries(c)), strict=True)
        assert sorted(by_row) == sorted((row, column, kind) for column, row, kind in by_column)
        assert view.cols.index.shape[1] == view.grid[0] * case.most


def test_causal_blocks_before_the_diagonal_are_full() -> None:
    case = LISTED[0]
    shape = ProblemShape(case.batch, case.q_heads, case.n_q, case.n_kv)
    (view,) = unpack(case.blocks, case.packed(CPU), shape).views
    for line, block, kind in zip(*(t.tolist() for t in view.rows.entries(0)), strict=True):
        assert block <= line
        assert (kind == FULL) == (block < line and line < case.n_q // case.unit_q)


def test_operators_fit_torch() -> None:
    case = LISTED[0]
    q, k, v = (t.requires_grad_() for t in case.operands()[:3])
    chosen, text = case.selection(), case.blocks.text
    shape = case.batch, case.q_heads, case.n_q, case.n_kv, case.kv_heads
    lists = [chosen.index, chosen.count]
    torch.library.opcheck(LAYOUT, ([], "[]", [], *shape, text, CPU, lists))
    torch.library.opcheck(ATTENTION, (q, k, v, [], [], [], case.packed(CPU), 0.25, text))


def test_which_units_are_blocks() -> None:
    assert are_blocks(128, 64, "cuda")
    assert not are_blocks(128, 64, "cpu")
    assert not are_blocks(1, 64, "cuda")

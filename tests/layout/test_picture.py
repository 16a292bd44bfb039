from __future__ import annotations

import sympy

from sparse_compile.expr import KV, H, MaskExpr, Q
from sparse_compile.layout import build_layout, picture
from sparse_compile.layout.superset import Problem, ProblemShape


def layout(mask: MaskExpr, tokens: int, block: int = 16):
    return build_layout(Problem.of(mask, ProblemShape(1, 2, tokens, tokens), (block, block)))


def test_a_large_grid_is_drawn_smaller() -> None:
    causal = layout(MaskExpr(KV <= Q), 16 * 100)
    lines = picture(causal, width=10).splitlines()
    assert lines == ["█" * i + "▒" + "·" * (9 - i) for i in range(10)]


def test_the_last_cells_may_be_smaller() -> None:
    everything = layout(MaskExpr(sympy.true), 16 * 7)
    assert picture(everything, width=3) == "███\n███\n███"


def test_each_class_has_its_picture() -> None:
    first_head_only = layout(MaskExpr(H < 1), 32)
    assert picture(first_head_only) == "██\n██"
    assert picture(first_head_only, index=1) == "··\n··"


def test_no_tokens_is_an_empty_picture() -> None:
    assert picture(layout(MaskExpr(KV <= Q), 0)) == ""

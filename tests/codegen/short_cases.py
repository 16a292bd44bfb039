"""Attention problems that one tile holds: few queries and few keys, in many batch entries."""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from torch import Tensor

from sparse_compile.codegen.triton.short.spec import LONGEST, why_not_short
from sparse_compile.expr import KV, SCORE, B, FloorMod, H, MaskExpr, Q, ScoreProgram, learned
from sparse_compile.spec import AttentionSpec, EmptyRows
from tests.codegen.kernel_cases import CASES as PLAIN
from tests.codegen.kernel_cases import EVERYTHING, T0, Case
from tests.codegen.score_cases import CASES as SCORED

W0, W1 = learned(0), learned(1)


def _shortened(case: Case) -> Case:
    """As many queries and keys as fit a tile, and as many key heads as heads."""
    n_q, n_kv = min(case.n[0], 37), min(case.n[1], LONGEST)
    heads = case.heads[0]
    return replace(case, n=(n_q, n_kv), heads=(heads, heads), views=(), batch=max(case.batch, 3))


def _is_short(case: Case) -> bool:
    spec = AttentionSpec(case.mask, EmptyRows.ZERO, score=case.score)
    return not why_not_short(spec, case.dims, case.dtype == torch.float32)


def _windows(case: Case, device: torch.device) -> list[Tensor]:
    """A bias of pairs for each head, and one for each of three kinds of windows."""
    generator = torch.Generator().manual_seed(4)
    shapes = (1, case.heads[0], *case.n), (3, 1, *case.n)
    return [torch.randn(s, generator=generator).to(device, case.dtype) for s in shapes]


def _of_entries(case: Case, device: torch.device) -> list[Tensor]:
    """A bias of pairs for each batch entry and head."""
    generator = torch.Generator().manual_seed(4)
    shape = (case.batch, case.heads[0], *case.n)
    return [torch.randn(shape, generator=generator).to(device, case.dtype)]


def _regions(case: Case, device: torch.device) -> list[Tensor]:
    """int32 [3, N]: which region of its window a token is in."""
    token = torch.arange(max(case.n), device=device, dtype=torch.int32)
    return [torch.stack([token * 0, token // 20, token % 7 // 4])]


def _program(value: sympy.Expr, *dtypes: str) -> ScoreProgram:
    return ScoreProgram(SCORE + value, dtypes)


_KIND = FloorMod(B, 3)
#: As in Swin: windows of 49 tokens, with a bias of each head; some are masked by regions, or get a
#: bias of their own.
WINDOWS = [
    Case(
        "windows",
        EVERYTHING,
        heads=(3, 3),
        n=(49, 49),
        batch=7,
        score=_program(W0(0, H, Q, KV), "float32"),
        learned=lambda case, device: _windows(case, device)[:1],
    ),
    Case(
        "windows of kinds",
        EVERYTHING,
        n=(49, 49),
        batch=6,
        score=_program(W0(0, H, Q, KV) + W1(_KIND, 0, Q, KV), "float32", "float32"),
        learned=_windows,
    ),
    Case(
        "windows of regions",
        MaskExpr(sympy.Eq(T0(_KIND, Q), T0(_KIND, KV)), ("int32",)),
        n=(49, 49),
        batch=6,
        tables=_regions,
        score=_program(W0(0, H, Q, KV), "float32"),
        learned=lambda case, device: _windows(case, device)[:1],
    ),
    Case(
        "a bias for each entry",
        EVERYTHING,
        n=(64, 16),
        batch=5,
        dims=(16, 48),
        score=_program(W0(B, H, Q, KV), "bfloat16"),
        learned=_of_entries,
        dtype=torch.bfloat16,
    ),
]

CASES = [*WINDOWS, *filter(_is_short, map(_shortened, [*PLAIN, *SCORED]))]

"""The kernel that scores windows, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from sparse_compile import patterns as P
from sparse_compile.codegen.triton.selection.window_scores import fits
from sparse_compile.expr import KV, FloorDiv, MaskExpr, Q
from sparse_compile.patterns.scorers import whole_windows
from sparse_compile.selection.builders import BUILDERS, Task
from sparse_compile.selection.masses import windows_of
from sparse_compile.selection.select import scoring
from sparse_compile.selection.visible import EVERYTHING, Visible
from tests.handed_in import serve_the_cpu
from tests.selection import naive

pytestmark = pytest.mark.usefixtures("interpreted_kernels")

LOWER = P.Causal(align="lower_right")
MASKS: list[Any] = [
    None,
    P.Causal(),
    LOWER,
    LOWER & P.SlidingWindow(250, align="lower_right"),
    LOWER & (P.SlidingWindow(90, align="lower_right") | P.Global(100)),
    P.Causal() & ~P.Causal(),
    P.Strided(64) & LOWER,
]


def task_of(pattern: Any, q: Tensor, k: Tensor, mask: Any, sizes: Sequence[int] = ()) -> Task:
    """What a pattern scores; the mask is a pattern or an expression."""
    mask = EVERYTHING if mask is None else mask
    expr = mask if isinstance(mask, MaskExpr) else mask.bound().expr
    lengths = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    visible = Visible(expr, (), sizes, *lengths, pattern.unit_q, pattern.block_kv, q.device)
    lists = naive.lists_of(pattern, q, k)
    return Task(q, k, pattern.unit_q, pattern.block_kv, lists, visible)


def by_kernel(pattern: Any, task: Task, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The scores of all units, in two chunks."""
    assert fits(windows_of(pattern.scorer, task))
    half = (task.rows + 1) // 2
    chunks = [(0, half), (half, task.rows)]
    with monkeypatch.context() as patch:
        serve_the_cpu(BUILDERS, patch)
        score = scoring(pattern.scorer, task).score
        return torch.cat([score(*chunk) for chunk in chunks if chunk[0] < chunk[1]], 2)


def assert_as_in_torch(
    pattern: Any,
    q: Tensor,
    k: Tensor,
    mask: Any,
    monkeypatch: pytest.MonkeyPatch,
    sizes: Sequence[int] = (),
) -> None:
    assert BUILDERS.get(q.device) is None
    task = task_of(pattern, q, k, mask, sizes)
    scores = scoring(pattern.scorer, task).score(0, task.rows)
    found = by_kernel(pattern, task, monkeypatch)
    assert found.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-4)
    # The best blocks are the same ones, where they are better than the next by more than rounding.
    best = min(pattern.k, scores.shape[3] - 1)
    top = scores.topk(best + 1, -1).values
    clear = top[..., best - 1] > top[..., best] + 1e-3
    kept = [t.topk(best, -1).indices.sort(-1).values[clear] for t in (found, scores)]
    torch.testing.assert_close(*kept, rtol=0, atol=0)


def operands(
    heads: tuple[int, int],
    n_q: int,
    n_kv: int,
    dim: int = 16,
    dtype: Any = torch.bfloat16,
    batch: int = 1,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, heads[0], n_q, dim), (batch, heads[1], n_kv, dim)
    q, k = (2 * torch.randn(shape, generator=generator) for shape in shapes)
    return q.to(dtype), k.to(dtype)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks(mask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows fill more than two tiles, the last of them and the last block in part."""
    pattern = P.TopK(3, unit_kv=32, scorer=P.OverlapPool(16, 8))
    assert_as_in_torch(pattern, *operands((8, 2), 33, 1190), mask, monkeypatch)


def test_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of a mask: one that is an argument of the kernel, and one that is a constant of it."""
    s0 = sympy.Symbol("s0", integer=True)
    pattern = P.TopK(3, unit_kv=32, scorer=P.OverlapPool(16, 8))
    operand = operands((16, 1), 12, 700)
    for predicate in (KV <= Q + s0, FloorDiv(KV, s0) <= FloorDiv(Q, s0) + 1):
        assert_as_in_torch(pattern, *operand, MaskExpr(predicate, (), 1), monkeypatch, [300])


@pytest.mark.parametrize(
    ("window", "block", "unit_q"), [(16, 16, 1), (80, 128, 16), (16, 16, 128), (80, 16, 1)]
)
def test_windows_and_units(
    window: int, block: int, unit_q: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of one and five cells; units within one tile, and of several."""
    pattern = P.TopK(3, unit_kv=16, block=block, unit_q=unit_q, scorer=P.OverlapPool(window, 16))
    n_q = 140 if unit_q == 128 else 20
    operand = operands((16, 1), n_q, 1150 if unit_q == 1 else 300)
    assert_as_in_torch(pattern, *operand, LOWER, monkeypatch)


@pytest.mark.parametrize(
    ("heads", "share"), [((6, 2), "group"), ((6, 2), "all"), ((6, 2), "none"), ((40, 1), "all")]
)
def test_heads(heads: tuple[int, int], share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of numbers that are no power of two, and lists of heads with several key heads."""
    pattern = P.TopK(3, unit_kv=16, scorer=P.OverlapPool(16, 8), share=share)
    dim, dtype = (20, torch.float16) if heads[0] == 6 else (16, torch.bfloat16)
    assert_as_in_torch(pattern, *operands(heads, 5, 200, dim, dtype), LOWER, monkeypatch)


@pytest.mark.parametrize(
    ("scale", "heads", "dtype"),
    [
        (None, 1, torch.float32),
        (None, 4, torch.bfloat16),
        (0.0, 4, torch.bfloat16),
        (-0.4, 1, torch.float32),
    ],
)
def test_compressed(
    heads: int, dtype: torch.dtype, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of queries' dtype and others, with more or fewer heads than those of the keys."""
    n_kv = 210
    q, k = operands((4, 2), 20, n_kv, batch=2)
    windows = whole_windows(n_kv, 32, 16)
    keys = torch.randn(2, heads, windows, 16, generator=torch.Generator().manual_seed(1))
    pattern = P.TopK(3, unit_kv=16, block=64, scorer=P.Compressed(keys.to(dtype), 32, 16, scale))
    assert_as_in_torch(pattern, q, k, LOWER, monkeypatch)


@pytest.mark.parametrize("unit_q", [1, 16])
def test_the_definition(unit_q: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition in fp64, spelled out in loops."""
    q, k = operands((4, 2), 21, 101, batch=2)
    pattern = P.TopK(3, unit_kv=16, unit_q=unit_q, scorer=P.OverlapPool(16, 8))
    for mask in (LOWER, LOWER & P.SlidingWindow(60, align="lower_right")):
        found = by_kernel(pattern, task_of(pattern, q, k, mask), monkeypatch)
        dense = mask.dense(21, 101, 2, 4).expand(2, 4, 21, 101)
        wanted = naive.scores(pattern, q, k, dense).float()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_numbers_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a NaN, or of an infinity, has no score; other rows do not suffer."""
    q, k = operands((4, 2), 20, 100, batch=2)
    q[0, 0, 3, 1], q[1, 2, 5, 0] = torch.nan, torch.inf
    pattern = P.TopK(3, unit_kv=16, scorer=P.OverlapPool(16, 8))
    found = by_kernel(pattern, task_of(pattern, q, k, LOWER), monkeypatch)
    spoilt = torch.zeros(2, 2, 20, dtype=torch.bool)
    spoilt[0, 0, 3] = spoilt[1, 1, 5] = True
    assert torch.equal(found.isnan().any(-1), spoilt)
    # Nor do keys that no query sees.
    q, k = operands((3, 1), 20, 100)
    k[:, :, 80:] = torch.nan
    pattern = P.TopK(3, unit_kv=16, unit_q=16, scorer=P.OverlapPool(16, 8))
    assert_as_in_torch(pattern, q, k, MaskExpr(sympy.And(KV <= Q + 80, KV < 80)), monkeypatch)


def test_what_does_not_fit() -> None:
    """Is left to torch."""
    pattern = P.TopK(3, unit_kv=16, scorer=P.OverlapPool(16, 8))
    q, k = operands((4, 2), 20, 100)
    assert fits(windows_of(pattern.scorer, task_of(pattern, q, k, LOWER)))
    assert not fits(windows_of(pattern.scorer, task_of(pattern, q.float(), k.float(), LOWER)))
    thirds = P.TopK(3, unit_kv=16, block=48, scorer=P.OverlapPool(32, 16))
    assert not fits(windows_of(thirds.scorer, task_of(thirds, q, k, LOWER)))
    by_head = P.heads([P.Causal(), P.All(), P.All(), P.All()])
    assert not fits(windows_of(pattern.scorer, task_of(pattern, q, k, by_head)))
    many = operands((130, 1), 2, 100)
    assert not fits(windows_of(pattern.scorer, task_of(pattern, *many, LOWER)))

"""Masks that select, in code that torch.compile compiles with any backend."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_compile
from sparse_compile import ops
from sparse_compile import patterns as P
from sparse_compile.api import data as direct_data
from sparse_compile.api import plan as direct_plan
from sparse_compile.api import select as direct_select
from sparse_compile.ops import ATTENTION
from sparse_compile.ops import selection as selection_ops
from sparse_compile.ops.selection import CANONICAL_SELECTION, SELECT
from sparse_compile.patterns.data import HoldsData
from sparse_compile.selection import Selection
from tests.selection.test_composition import DOCUMENTS, N, Nearest, check, dense_of, index, operands

CHOSEN = P.Selected(index(), unit_kv=16)
MASKS = [
    P.Causal() & CHOSEN,
    P.Causal() & CHOSEN | P.SlidingWindow(9),
    DOCUMENTS & P.Causal() & (CHOSEN | P.SlidingWindow(9)),
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", "sparse_compile"])
def test_compiled(backend: str) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: P.Pattern) -> Tensor:
        return sparse_compile.attention(q * 1.0, k, v, mask) + 0.0

    fast = torch.compile(run, backend=backend, fullgraph=True)
    # Inductor gets what AOTAutograd does: one graph shows it.
    for mask in MASKS[: 1 if backend == "inductor" else None]:
        check(mask, dense_of(mask, CHOSEN, 4), fast)


def test_a_selection_by_content() -> None:
    nearest = Nearest()
    q, k, _ = operands(4, 2, N, N, torch.float32)
    dense = nearest.select(q, k, None, [], []).dense(N, N).repeat_interleave(2, 1)
    mask = P.Causal() & nearest | P.SlidingWindow(3)
    fast = torch.compile(sparse_compile.attention, backend="aot_eager", fullgraph=True)
    check(mask, P.Causal().dense(N, N) & dense | P.SlidingWindow(3).dense(N, N), fast)


SCORED: list[Callable[[], P.Scored]] = [
    lambda: P.TopK(2, unit_kv=16),
    lambda: P.TopK((1, 3), unit_kv=16, unit_q=16, local=1, scorer=P.MinMax()),
    lambda: P.TopRatio(0.4, unit_kv=16),
    lambda: P.TopP(0.7, unit_kv=16, unit_q=16, scorer=P.Antidiagonal(8)),
    lambda: P.Threshold(0.1, of="softmax", unit_kv=16),
    lambda: P.NSASelection(16, 3, 8, 4, 1, 1),
    lambda: P.MoBA(16, 2),
]


@pytest.mark.parametrize("make", SCORED, ids=[repr(make()) for make in SCORED])
def test_a_selection_by_scores_made_in_compiled_code(make: Callable[[], P.Scored]) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, _: P.Pattern) -> Tensor:
        return sparse_compile.attention(q, k, v, P.Causal() & make() | P.SlidingWindow(3))

    fast = torch.compile(run, backend="aot_eager", fullgraph=True)
    given = operands(4, 2, N, N, torch.float32)
    mask = P.Causal() & make() | P.SlidingWindow(3)
    chosen = sparse_compile.select(mask, *given[:2])
    dense = chosen.dense(N, N).repeat_interleave(4 // chosen.index.shape[1], 1)
    near = P.SlidingWindow(3).dense(N, N)
    check(mask, P.Causal().dense(N, N) & dense | near, fast)


def test_a_selection_from_outside_combined_in_compiled_code() -> None:
    nearest, plain = Weighted(torch.ones(16)), P.TopK(2, unit_kv=16)

    def run(q: Tensor, k: Tensor, v: Tensor, chosen: P.Pattern) -> Tensor:
        return sparse_compile.attention(q, k, v, P.Causal() & chosen)

    fast = torch.compile(run, backend="aot_eager", fullgraph=True)
    q, k, v = operands(4, 2, N, N, torch.float32)
    for chosen in (nearest, plain, DOCUMENTS):
        expected = sparse_compile.attention(q, k, v, P.Causal() & chosen)
        torch.testing.assert_close(fast(q, k, v, chosen), expected)


def by_compressed(q: Tensor, k: Tensor) -> P.TopK:
    keys = k.unfold(2, 8, 8).mean(-1)
    return P.TopK(2, unit_kv=16, scorer=P.Compressed(keys, 8, 8))


def by_indexer(q: Tensor, k: Tensor) -> P.TopK:
    return P.DSA(q * 2, k[:, 0] + 1, q[..., 0].transpose(1, 2).contiguous(), 9)


@pytest.mark.parametrize("make", [by_compressed, by_indexer])
@pytest.mark.parametrize("backend", ["aot_eager", "sparse_compile"])
def test_a_scorer_that_holds_results_of_compiled_code(
    make: Callable[[Tensor, Tensor], P.TopK], backend: str
) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, _: P.Pattern) -> Tensor:
        return sparse_compile.attention(q, k, v, P.Causal() & make(q, k) | P.SlidingWindow(3))

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    fast = torch.compile(run, backend=counter, fullgraph=True)
    given = operands(4, 2, N, N, torch.float32)
    mask = P.Causal() & make(*given[:2]) | P.SlidingWindow(3)
    chosen = sparse_compile.select(mask, *given[:2])
    assert 0 < int(chosen.count.max()) <= chosen.index.shape[-1]
    dense = chosen.dense(N, N).repeat_interleave(4 // chosen.index.shape[1], 1)
    wanted = P.Causal().dense(N, N) & dense | P.SlidingWindow(3).dense(N, N)
    plans = len(direct_plan._NAMES)
    for call in (run, fast, run, fast):
        check(mask, wanted, call)
    assert counter.frame_count == 1
    assert len(direct_plan._NAMES) <= plans + 1


def test_a_function_in_a_pattern_must_come_from_outside() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chosen = P.TopK(2, unit_kv=16, scorer=lambda q, k: q)
        return sparse_compile.attention(q, k, v, P.Causal() & chosen)

    given = operands(4, 2, N, N, torch.float32)
    with pytest.raises(Exception, match=r"TopK that the compiled code makes .*Make it outside"):
        torch.compile(run, backend="aot_eager", fullgraph=True)(*given)


class Routed(nn.Module):
    """Its indices are results of the code that is compiled."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        chosen = P.Selected(numbers + 1, unit_kv=16)
        mask = P.Causal() & (chosen | P.SlidingWindow(5))
        return sparse_compile.attention(q, k, v, mask)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor", "sparse_compile"])
def test_indices_made_in_compiled_code(backend: str) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    fast = torch.compile(Routed(), backend=counter, fullgraph=True)
    for most in (3, 3, 3):
        numbers = index(most=most) + int(torch.randint(2, ()))

        def run(q: Tensor, k: Tensor, v: Tensor, _: P.Pattern, given: Tensor = numbers) -> Tensor:
            return fast(q, k, v, given)

        chosen = P.Selected(numbers + 1, unit_kv=16)
        mask = P.Causal() & (chosen | P.SlidingWindow(5))
        check(mask, dense_of(mask, chosen, 4), run)
    assert counter.frame_count == 1


def test_two_indices_are_told_apart() -> None:
    one, two = index(most=3), index(most=2)

    def both(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        mask = P.Causal() & (P.Selected(a, 16) | P.Selected(b, 16))
        return sparse_compile.attention(q, k, v, mask)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(both, backend=counter, fullgraph=True)
    for a, b in ((one, two), (two, one), (one + 1, two)):
        chosen = P.Selected(torch.cat([a, b], -1), 16)
        mask = P.Causal() & chosen
        check(mask, dense_of(mask, chosen, 4), lambda q, k, v, _, a=a, b=b: fast(q, k, v, a, b))


class Packed(nn.Module):
    """Indices of the compiled code among documents that come from outside."""

    def __init__(self, documents: P.Pattern) -> None:
        super().__init__()
        self.documents = documents

    def forward(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        chosen = P.Selected(numbers + 1, unit_kv=16)
        mask = self.documents & P.Causal() & (chosen | P.SlidingWindow(5))
        return sparse_compile.attention(q, k, v, mask)


@pytest.mark.parametrize("compiled", [False, True])
def test_indices_of_the_code_among_documents_from_outside(compiled: bool) -> None:
    ids = torch.arange(N) // 30
    packed = Packed(P.Documents(ids))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(packed, backend=counter, fullgraph=True) if compiled else packed

    def checked(numbers: Tensor) -> None:
        chosen = P.Selected(numbers + 1, unit_kv=16)
        mask = packed.documents & P.Causal() & (chosen | P.SlidingWindow(5))
        check(mask, dense_of(mask, chosen, 4), lambda q, k, v, _: run(q, k, v, numbers))

    gc.collect()  # what other tests left
    checked(index())
    plans = len(direct_plan._NAMES)
    checked(index() - 1)
    ids.copy_(torch.arange(N) // 20)
    checked(index() - 2)
    assert counter.frame_count == compiled
    assert len(direct_plan._NAMES) == plans
    packed.documents = P.Documents(torch.arange(N) // 13)
    checked(index())
    gc.collect()
    assert len(direct_plan._NAMES) == plans


@pytest.mark.parametrize("static", [P.SlidingWindow(9), DOCUMENTS])
def test_new_contents_compile_nothing(static: P.Pattern) -> None:
    numbers = index()
    mask = P.Causal() & P.Selected(numbers, unit_kv=16) | static
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(sparse_compile.attention, backend=counter, fullgraph=True)
    for shift in (0, 1, 2):
        numbers.copy_(index() - shift)
        chosen = P.Selected(numbers, unit_kv=16)
        check(mask, dense_of(P.Causal() & chosen | static, chosen, 4), fast)
    assert counter.frame_count == 1


def test_other_indices_of_one_shape_compile_nothing() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(sparse_compile.attention, backend=counter, fullgraph=True)
    for shift in (0, 1, 2):
        chosen = P.Selected(index() - shift, unit_kv=16)
        mask = P.Causal() & chosen | P.SlidingWindow(9)
        check(mask, dense_of(mask, chosen, 4), fast)
    assert counter.frame_count == 1


def test_dynamic_lengths() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(sparse_compile.attention, backend=counter, fullgraph=True, dynamic=True)
    for n in (40, 56, 72):
        chosen = P.Selected(index(n_q=n, n_kv=n), unit_kv=16)
        mask = P.Causal() & chosen | P.SlidingWindow(9)
        check(mask, dense_of(mask, chosen, 4, n, n), fast)
    assert counter.frame_count == 1


@pytest.mark.parametrize("mask", [*MASKS, P.TopK(2, unit_kv=16)], ids=range(len(MASKS) + 1))
def test_operators_fit_torch(mask: P.Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Callable[..., object], tuple[object, ...]]] = []
    for home, name in (
        (direct_select, "SELECT"),
        (direct_data, "CANONICAL_SELECTION"),
        (ops, "ATTENTION"),
    ):
        original = getattr(home, name)

        def noted(*args: object, original: Callable[..., object] = original) -> object:
            calls.append((original, args))
            return original(*args)

        monkeypatch.setattr(home, name, noted)
    CHOSEN.index.add_(0)  # whose lists may be known
    sparse_compile.attention(*operands(4, 2, N, N, torch.float32), mask)
    assert calls[0][0] is (SELECT if isinstance(mask, P.Scored) else CANONICAL_SELECTION)
    assert len(calls) == 1 or calls[1][0] is ATTENTION
    for operator, args in calls:
        torch.library.opcheck(operator, args)


@dataclass(frozen=True, repr=False, eq=False)
class Weighted(HoldsData, Nearest):
    """A selection whose scorer holds weights."""

    weight: Tensor

    def select(self, q: Tensor, k: Tensor, mask: Any, tables: Any, sizes: Any) -> Selection:
        return super().select(q * self.weight, k, mask, tables, sizes)


def test_weights_of_a_scorer_are_read_in_each_call() -> None:
    weight = torch.randn(16)
    mask = P.Causal() & Weighted(weight) | P.SlidingWindow(3)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(sparse_compile.attention, backend=counter, fullgraph=True)
    q, k, _ = operands(4, 2, N, N, torch.float32)
    for _step in range(2):
        chosen = Weighted(weight).select(q, k, None, [], [])
        dense = chosen.dense(N, N).repeat_interleave(2, 1)
        check(mask, P.Causal().dense(N, N) & dense | P.SlidingWindow(3).dense(N, N), fast)
        weight.copy_(torch.randn(16))
    assert counter.frame_count == 1


def test_names_go_with_their_patterns() -> None:
    before = set(selection_ops._LEAVES)
    nearest = Weighted(torch.ones(16))
    given = operands(4, 2, N, N, torch.float32)
    for mask in (nearest, P.Causal() & nearest | P.SlidingWindow(3)):
        sparse_compile.attention(*given, mask)
    del mask, nearest
    gc.collect()
    assert set(selection_ops._LEAVES) == before


def test_a_selection_is_made_again_in_a_checkpoint() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: P.Pattern) -> Tensor:
        return checkpoint(sparse_compile.attention, q, k, v, mask, use_reentrant=False)

    for mask in MASKS:
        check(mask, dense_of(mask, CHOSEN, 4), torch.compile(run, backend="aot_eager"))

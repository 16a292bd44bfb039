"""One selection for several attentions: made once, and of the same meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_compile
from sparse_compile import Selection
from sparse_compile import patterns as P
from sparse_compile.api import data as direct_data
from sparse_compile.api import select as direct_select
from sparse_compile.errors import BadPattern, BadShape, PatternMisuse
from sparse_compile.selection import canonical
from tests.passes.rewritten import Rewritten
from tests.selection.test_composition import N, check, dense_of, index, operands

SCORED = P.TopK(2, unit_kv=16, local=1)
LAYERS = 3


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each operator that makes lists was called."""
    counts = {"SELECT": 0, "CANONICAL_SELECTION": 0}
    for home, name in ((direct_select, "SELECT"), (direct_data, "CANONICAL_SELECTION")):
        original = getattr(home, name)

        def called(*args: Any, of: Callable[..., Any] = original, name: str = name) -> Any:
            counts[name] += 1
            return of(*args)

        monkeypatch.setattr(home, name, called)
    return counts


def layers(q: Tensor, k: Tensor, v: Tensor, mask: P.Pattern) -> Tensor:
    return sum(sparse_compile.attention(q * n, k, v, mask) for n in range(1, LAYERS))  # type: ignore


def other_layers(q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
    x = q
    for n in range(LAYERS):
        mask = P.Causal() & P.Selected(numbers, unit_kv=16) | P.SlidingWindow(n + 3)
        x = x + sparse_compile.attention(x, k, v, mask).sum(-1, keepdim=True)
    return x


@pytest.mark.parametrize(
    "mask",
    [
        P.Causal() & SCORED,
        P.Causal() & (SCORED | P.SlidingWindow(5)),
        P.Causal() & (P.Selected(index(2), 16) | P.Selected(index(1, 2), 16)),
        P.Causal() & P.Selected((((((0, 2),) * N),),) * 2, 16) | P.Global(2),
        SCORED & P.Causal() & P.Documents(torch.arange(N) // 30),
    ],
    ids=range(5),
)
def test_what_is_selected_once_means_the_same(mask: P.Pattern) -> None:
    q, k, v = operands(4, 2, N, N, torch.float32)
    chosen = sparse_compile.select(mask, q, k)
    shared = _with(mask, chosen)
    check(shared, dense_of(shared, chosen.pattern, 4))
    ours, its = (sparse_compile.attention(q, k, v, one) for one in (shared, mask))
    assert torch.equal(ours, its)


def _with(mask: P.Pattern, chosen: Selection) -> P.Pattern:
    if isinstance(mask, (P.And, P.Or)):
        parts = [_with(part, chosen) for part in mask.parts]
        return type(mask)(*parts)
    return chosen.pattern if isinstance(mask, P.Selecting) else mask


def test_scores_are_computed_once(counted: dict[str, int]) -> None:
    q, k, v = operands(4, 2, N, N, torch.float32)
    chosen = sparse_compile.select(P.Causal() & SCORED, q, k)
    for window in (3, 5):
        mask = P.Causal() & chosen.pattern | P.SlidingWindow(window)
        layers(q, k, v, mask)
    assert counted == {"SELECT": 1, "CANONICAL_SELECTION": 0}


def test_lists_of_an_index_are_made_once_until_it_changes(counted: dict[str, int]) -> None:
    given, numbers = operands(4, 2, N, N, torch.float32), index()
    before = other_layers(*given, numbers)
    with torch.inference_mode():  # whose tensors no backward can use
        other_layers(*given, numbers)
    other_layers(*given, numbers).sum().backward()
    assert counted["CANONICAL_SELECTION"] == 2
    numbers.add_(1).clamp_(max=4)
    after = other_layers(*given, numbers)
    assert not torch.equal(before, after)
    assert counted == {"SELECT": 0, "CANONICAL_SELECTION": 3}
    torch.testing.assert_close(after, other_layers(*given, numbers.clone()))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_graph_makes_the_lists_of_an_index_once(training: bool, dynamic: bool) -> None:
    given, program = operands(4, 2, N, N, torch.float32), Rewritten()
    with torch.set_grad_enabled(training):
        fast = program.compiled(other_layers, dynamic)(*given, index())
    torch.testing.assert_close(fast, other_layers(*given, index()))
    called = program.targets()
    assert called.count("sparse_compile.canonical_selection.default") == 1
    assert called.count("sparse_compile.attention.default") == LAYERS


def test_an_index_that_the_graph_overwrites_is_not_shared() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        one = sparse_compile.attention(q, k, v, P.Causal() & P.Selected(numbers, unit_kv=16))
        numbers.sub_(1)
        return one - sparse_compile.attention(q, k, v, P.Causal() & P.Selected(numbers, unit_kv=16))

    given, program = operands(4, 2, N, N, torch.float32), Rewritten()
    fast = program.compiled(run)(*given, index())
    torch.testing.assert_close(fast, run(*given, index()))
    assert program.targets().count("sparse_compile.canonical_selection.default") == 2


@pytest.mark.parametrize("backend", ["aot_eager", "sparse_compile"])
def test_selected_and_used_in_compiled_code(backend: str) -> None:
    def first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Selection]:
        chosen = sparse_compile.select(P.Causal() & P.TopK(2, unit_kv=16), q, k)
        return layers(q, k, v, P.Causal() & chosen.pattern), chosen

    def second(q: Tensor, k: Tensor, v: Tensor, chosen: Selection) -> Tensor:
        return layers(q, k, v, P.Causal() & chosen.pattern)

    torch._dynamo.reset()
    given = operands(4, 2, N, N, torch.float32)
    wanted, chosen = first(*given)
    found, made = torch.compile(first, backend=backend, fullgraph=True)(*given)
    torch.testing.assert_close(found, wanted)
    assert isinstance(made, Selection)
    assert torch.equal(made.dense(N, N), chosen.dense(N, N))
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    later = torch.compile(second, backend=counter, fullgraph=True)
    for one in (made, sparse_compile.select(P.Causal() & SCORED, *given[:2])):
        torch.testing.assert_close(later(*given, one), second(*given, one))
    assert counter.frame_count == 1


def test_any_index_as_a_selection() -> None:
    q, k, v = operands(4, 2, N, N, torch.float32)
    numbers = index(lists=2)
    chosen = Selection(*canonical(numbers, 5), 1, 16)
    mine = sparse_compile.attention(q, k, v, P.Causal() & chosen.pattern)
    its = sparse_compile.attention(q, k, v, P.Causal() & P.Selected(numbers, 16))
    assert torch.equal(mine, its)


def test_mistakes() -> None:
    q, k, _ = operands(4, 2, N, N, torch.float32)
    for mask in (P.Causal(), P.Causal() | P.Causal() & SCORED, None):
        with pytest.raises(PatternMisuse, match="selects nothing"):
            sparse_compile.select(mask, q, k)  # type: ignore[arg-type]
    with pytest.raises(BadShape, match="agree in B"):
        sparse_compile.select(SCORED, q, k[:1])
    chosen = sparse_compile.select(SCORED, q, k)
    with pytest.raises(BadPattern, match="Write its `pattern`"):
        P.Selected(chosen)
    with pytest.raises(BadPattern, match="no int32 tensors"):
        P.Selected(chosen.index.long(), 16, 1, chosen.count)
    with pytest.raises(BadPattern, match="no int32 tensors"):
        P.Selected(chosen.index, 16, 1, chosen.count[:, :1])
    with pytest.raises(BadPattern, match=r"Write \[2, heads, 70, selected\]"):
        sparse_compile.attention(q[:, :, :70], k, k, chosen.pattern)

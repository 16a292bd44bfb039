"""sparse_compile.attention: the function, eagerly and inside compiled code."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import sparse_compile
from sparse_compile import patterns as P
from sparse_compile.api import data as direct_data
from sparse_compile.errors import BadPattern, BadShape, PatternMisuse, UnsupportedDtype
from sparse_compile.layout import layout, lists, tensor_state
from sparse_compile.reference import attention as reference
from tests.tolerance import relative_error

B, H, N, D = 2, 4, 70, 16
DOCUMENTS = P.Documents(torch.arange(N) // 20)
PATTERNS = [
    P.SlidingWindow(9),
    P.Causal(),
    DOCUMENTS,
    P.SlidingWindow(5) | P.Global(2),
    P.Random(block=16, random=1, seed=0) | P.SlidingWindow(1),
    P.Causal() & DOCUMENTS & ~P.Causal(),  # which reads no table
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def operands(n: int = N, value_dim: int = D) -> list[Tensor]:
    shapes = (B, H, n, D), (B, 2, n, D), (B, 2, n, value_dim)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def check(
    run: Callable[..., Tensor], mask: Any, dense: Tensor | None, scale: float | None = None
) -> None:
    given = operands(value_dim=8)
    exact = [t.detach().double().requires_grad_() for t in given]
    ours = run(*given, mask) if scale is None else run(*given, mask, scale)
    wanted, _ = reference(*exact, dense, scale)
    assert relative_error(ours, wanted) < 1e-5
    grads = torch.autograd.grad(ours.square().sum(), given)
    wanted_grads = torch.autograd.grad(wanted.square().sum(), exact)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert relative_error(grad, wanted_grad) < 1e-5


@pytest.mark.parametrize("pattern", [*PATTERNS, None], ids=repr)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_eager(pattern: P.Pattern | None, scale: float | None) -> None:
    dense = None if pattern is None else pattern.dense(N, N, B, H)
    check(sparse_compile.attention, pattern, dense, scale)


@pytest.mark.parametrize("shape", [(N, N), (H, N, N), (B, 1, N, N), (B, 1, 1, N)])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_mask_tensor(shape: tuple[int, ...], backend: str | None) -> None:
    dense = torch.rand(shape) > 0.7
    run: Callable[..., Tensor] = sparse_compile.attention
    if backend:
        run = torch.compile(run, backend=backend, fullgraph=True)
    check(run, dense, dense.broadcast_to(B, H, N, N))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", "sparse_compile"])
def test_compiled(backend: str) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: P.Pattern) -> Tensor:
        return sparse_compile.attention(q * 1.0, k, v, mask) + 0.0

    fast = torch.compile(run, backend=backend, fullgraph=True)
    # Inductor gets what AOTAutograd does: one graph shows it.
    for pattern in PATTERNS[: 1 if backend == "inductor" else 3]:
        check(fast, pattern, pattern.dense(N, N, B, H))


@pytest.mark.parametrize(
    "make",
    [lambda: P.SlidingWindow(6), lambda: P.SlidingWindow(6, 0) | P.Global(2) & P.Strided(4)],
)
def test_a_pattern_made_in_compiled_code(make: Callable[[], P.Pattern]) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, _: None) -> Tensor:
        return sparse_compile.attention(q, k, v, make())

    fast = torch.compile(run, backend="aot_eager", fullgraph=True)
    check(fast, None, make().dense(N, N, B, H))


def test_a_pattern_made_of_tensors_in_compiled_code() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_compile.attention(q, k, v, P.Documents(torch.arange(N) // 20))

    with pytest.raises(Exception, match="a Documents that the compiled code makes from tensors"):
        torch.compile(run, backend="aot_eager", fullgraph=True)(*operands())


def _first(count: int) -> Tensor:
    return P.Global(count).dense(N, N)


def test_equal_patterns_share_a_compilation() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(sparse_compile.attention, backend=counter, fullgraph=True)
    for _ in range(3):
        check(fast, P.SlidingWindow(4) | P.Global(1), P.SlidingWindow(4).dense(N, N) | _first(1))
    assert counter.frame_count == 1
    for left in (5, 6):  # torch.compile tries to keep a number that changes symbolic
        check(
            fast, P.SlidingWindow(left) | P.Global(1), P.SlidingWindow(left).dense(N, N) | _first(1)
        )


def test_compiled_module_follows_its_pattern() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pattern: P.Pattern = P.SlidingWindow(3)

        def forward(self, q: Tensor, k: Tensor, v: Tensor, _: None) -> Tensor:
            return sparse_compile.attention(q, k, v, self.pattern)

    block = Block()
    fast = torch.compile(block, backend="aot_eager", fullgraph=True)
    for pattern in (P.SlidingWindow(3), P.SlidingWindow(7), DOCUMENTS):
        block.pattern = pattern
        check(fast, None, pattern.dense(N, N, B, H))


@pytest.mark.parametrize("compiled", [False, True])
def test_tensors_of_a_pattern_are_read_in_each_call(compiled: bool) -> None:
    ids = torch.arange(N) // 20
    pattern = P.Documents(ids)
    run: Callable[..., Tensor] = sparse_compile.attention
    if compiled:
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    check(run, pattern, pattern.dense(N, N, B, H))
    ids.copy_(torch.arange(N) // 7)
    check(run, pattern, pattern.dense(N, N, B, H))


@pytest.mark.parametrize("pattern", [P.SlidingWindow(5), P.Random(block=8, random=2, seed=0)])
def test_dynamic_lengths(pattern: P.Pattern) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(sparse_compile.attention, backend=counter, fullgraph=True, dynamic=True)
    for n in (40, 56, 72):
        q, k, v = operands(n)
        wanted, _ = reference(q, k, v, pattern.dense(n, n, B, H))
        assert relative_error(fast(q, k, v, pattern), wanted) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.zeros(B, H, N, D).double()}, UnsupportedDtype, "torch.float64"),
        ({"k": torch.zeros(B, 3, N, D)}, BadShape, "4 query heads cannot share 3"),
        ({"mask": P.Documents(torch.zeros(9).long())}, BadPattern, ""),
        ({"mask": torch.ones(N, N)}, BadPattern, "this attention mask is a bias"),
        ({"mask": torch.ones(N, N).int()}, PatternMisuse, "mask of torch.int32. Pass a bool tens"),
        ({"mask": torch.ones(N, 3).bool()}, BadShape, "does not broadcast to [B, Hq, Nq, Nkv] = "),
        ({"mask": torch.ones(1, B, 1, N, N).bool()}, BadShape, "does not broadcast"),
        ({"mask": "causal"}, PatternMisuse, "mask of type str. Pass a pattern"),
    ],
)
def test_misuse(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = operands()
    with pytest.raises(error) as caught:
        sparse_compile.attention(**{"q": q, "k": k, "v": v, "mask": P.Causal(), **change})
    assert message in str(caught.value)


def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every layout that an eager call makes."""
    calls: list[int] = []
    original = direct_data.make_data

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(direct_data, "make_data", counted)
    return calls


def test_eager_calls_keep_the_layout_while_the_tensors_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, ids = made(monkeypatch), torch.arange(N) // 20
    given = operands()
    pattern = P.Documents(ids) & P.SlidingWindow(30)
    for expected in (1, 1):
        sparse_compile.attention(*given, pattern)
        assert len(calls) == expected
    ids[:] = torch.arange(N) // 7
    found = sparse_compile.attention(*given, pattern)
    assert len(calls) == 2
    exact = [t.detach().double() for t in given]
    wanted, _ = reference(*exact, pattern.dense(N, N, B, H))
    assert relative_error(found, wanted) < 1e-5
    # Another length, and another pattern of equal tensors, are other layouts.
    sparse_compile.attention(*given, P.Documents(ids) & P.SlidingWindow(30))
    assert len(calls) == 3


def test_what_cannot_be_watched_is_read_in_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, ids = made(monkeypatch), torch.arange(N) // 20
    watched = P.Predicate(lambda b, h, q, kv: ids[q] == ids[kv])
    with torch.inference_mode():
        unseen = P.Documents(torch.arange(N) // 20)
        for pattern in (watched, watched, unseen, unseen):
            sparse_compile.attention(*operands(), pattern)
    assert len(calls) == 4


def test_few_layouts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_data, "_KEPT", type(direct_data._KEPT)())
    for seed in range(direct_data._MOST + 3):
        sparse_compile.attention(*operands(), P.Random(block=16, random=1, seed=seed))
    assert len(direct_data._KEPT) == direct_data._MOST


@pytest.mark.parametrize("pattern", [None, DOCUMENTS], ids=["tensor", "documents"])
def test_equal_masks_of_one_graph_in_plain_inductor(pattern: P.Pattern | None) -> None:
    """AOTAutograd merges equal calls, but not the sizes of what they return."""

    def twice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        first = sparse_compile.attention(q, k, v, mask > 0 if pattern is None else pattern)
        return sparse_compile.attention(first, k, v, mask > 0 if pattern is None else pattern)

    mask = torch.rand(1, 1, N, N) - 0.4
    given = operands()
    run = torch.compile(twice, backend="inductor", fullgraph=True)
    results = []
    for function in (run, twice):
        out = function(*given, mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for ours, wanted in zip(*results, strict=True):
        assert relative_error(ours, wanted) < 1e-5


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor", "sparse_compile"])
def test_no_layout_is_scheduled_again_from_its_packed_form(
    backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that would wait for the device, in a forward and again in a backward."""
    scheduled: list[str] = []
    original = layout._schedules

    def counted(*arguments: Any) -> Any:
        scheduled.append(arguments[1])
        return original(*arguments)

    # Lists as kernels on a GPU get them.
    monkeypatch.setattr(lists, "_WITH_WORKLISTS", ("cpu",))
    monkeypatch.setattr(lists, "workers_of", lambda device: 64)
    monkeypatch.setattr(layout, "_schedules", counted)
    pattern = P.Documents(torch.arange(N) // 20) & P.SlidingWindow(30)

    def call(*given: Tensor) -> Tensor:
        return sparse_compile.attention(*given, pattern)

    run = torch.compile(call, backend=backend) if backend else call
    for number in (1, 2):
        run(*operands()).sum().backward()
        made = number if backend else 1
        assert scheduled == ["q", "kv"] * made


def test_remembered_layouts_do_not_outlive_their_tensors() -> None:
    ids = torch.arange(N) // 20
    pattern = P.Predicate(lambda b, h, q, kv: ids[q] == ids[kv])
    gc.collect()
    before = len(tensor_state._MEMORIES)
    for _ in range(3):
        sparse_compile.attention(*operands(), pattern).sum().backward()
    gc.collect()
    assert len(tensor_state._MEMORIES) == before


def test_a_layout_made_in_inference_mode_is_not_trained_with() -> None:
    pattern = P.Random(block=16, random=2, seed=5)
    with torch.inference_mode():
        sparse_compile.attention(*operands(), pattern)
    sparse_compile.attention(*operands(), pattern).sum().backward()

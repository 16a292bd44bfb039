"""Masks are checked against the captured graph as it is, not against the slice that was lifted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from sparse_compile.expr import KV, Q
from sparse_compile.options import Options
from sparse_compile.passes import mutation, pipeline
from sparse_compile.passes.lift import LiftCache, lift_mask, prefix
from sparse_compile.passes.lift.slice import Slice, Slicer, Wanted
from sparse_compile.passes.mutation import Effect, effect
from sparse_compile.passes.watch import Unwatched
from sparse_compile.sites.operands import Scope
from sparse_compile.sites.plan import Plan
from sparse_compile.sites.site import LiftedMask, Rejection
from tests.passes.lifting import Captured, attend, capture, lift, lifted, refused, sites
from tests.passes.rewritten import Rewritten

N = 16


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 2, N, 8, generator=torch.Generator().manual_seed(0))


def causal() -> Tensor:
    i = torch.arange(N)
    return i[None] <= i[:, None]


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def widen(m: Tensor) -> None:
    """Writes to its input, and its name does not say so."""
    m[:, :3] = True


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def inverted(m: Tensor) -> Tensor:
    return ~m


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def noise(m: Tensor) -> Tensor:
    return torch.rand(m.shape) < 0.5


def call_of(captured: Captured, function: Callable[..., Any]) -> Node:
    nodes: list[Node] = [n for n in captured.gm.graph.nodes if n.target is function]
    (node,) = nodes
    return node


def test_a_function_that_writes_to_its_input_is_seen_to(x: Tensor) -> None:
    def run(x: Tensor) -> Tensor:
        mask = causal()
        widen(mask)
        return attend(x, mask)

    captured = capture(run, x)
    call = call_of(captured, widen)
    assert effect(call) == Effect(tuple(call.all_input_nodes))
    assert lifted(run, x).mask.predicate == (KV <= Q) | (KV < 3)
    made = Rewritten()
    torch.testing.assert_close(made.compiled(run)(x), run(x))
    assert isinstance(made.decisions[0], Plan)


def test_a_function_that_only_reads_writes_nothing(x: Tensor) -> None:
    def run(x: Tensor) -> Tensor:
        mask = causal()
        unused: Tensor = inverted(mask)
        return attend(x, mask) + unused.sum()

    assert effect(call_of(capture(run, x), inverted)) == Effect()


def test_a_function_that_cannot_be_watched_writes_to_all(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(x: Tensor) -> Tensor:
        mask = causal()
        inverted(mask)
        return attend(x, mask)

    def fails(*_: Any) -> Any:
        raise Unwatched("no")

    monkeypatch.setattr(mutation, "watch", fails)
    captured = capture(run, x)
    call = call_of(captured, inverted)
    assert effect(call) == Effect(tuple(call.all_input_nodes), known=False)
    found = lift(captured)
    assert isinstance(found, Rejection)
    assert found.reason == "what `inverted` does is not known: it may write to the mask"


WRITES: dict[str, Callable[[Tensor], object]] = {
    "setitem": lambda m: m.__setitem__(0, True),
    "numpy": lambda m: np.fill_diagonal(m.numpy(), False),
    "method": lambda m: m.logical_not_(),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_that_the_slice_misses_is_caught(name: str, x: Tensor) -> None:
    """As if the function were taken for one that reads: what is lifted then is wrong."""

    def run(x: Tensor) -> Tensor:
        mask = causal()
        WRITES[name](mask)
        return attend(x, mask)

    class Blind(Slicer):
        def __call__(self, wanted: Sequence[Wanted], scope: Scope) -> Slice:
            graph = self.graph(scope)
            graph.writes = {}
            return super().__call__(wanted, scope)

    captured = capture(run, x)
    (site,) = sites(captured.gm)
    found = lift_mask(site, captured.inputs, Options(), LiftCache(slicer=Blind()))
    assert isinstance(found, Rejection), found
    assert "differs from the program's" in found.reason


def test_the_check_leaves_the_inputs_alone(x: Tensor) -> None:
    def run(x: Tensor, pad: Tensor, cache: Tensor) -> Tensor:
        cache[:, :, 0] = 1.0
        mask = causal() & pad
        pad.logical_not_()
        return attend(x + cache, mask)

    args = x, torch.arange(N) < 9, torch.zeros(1, 2, N, 8)
    captured = capture(run, *args)
    before = [item.clone() for item in captured.inputs if isinstance(item, Tensor)]
    assert isinstance(lift(captured), LiftedMask)
    after = [item for item in captured.inputs if isinstance(item, Tensor)]
    torch.testing.assert_close(after, before)


def test_layers_that_share_a_mask_check_it_once(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(x: Tensor) -> Tensor:
        mask, other = causal(), causal().flip(0)
        for _ in range(3):
            x = attend(attend(x, mask), other)
        return x

    runs: list[prefix.Prefix] = []
    kept = prefix.Prefix.run

    def counted(self: prefix.Prefix, *args: Any) -> list[Any]:
        runs.append(self)
        return kept(self, *args)

    monkeypatch.setattr(prefix.Prefix, "run", counted)
    captured = capture(run, x)
    traces = pipeline.run(captured.gm, captured.inputs, Options(decide="sparse"))
    assert all(isinstance(trace.decision, Plan) for trace in traces)
    assert len(runs) == 2


def big(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """Something in place, of the result of a product, comes before the mask is read."""
    hidden = F.linear(x, weight)
    hidden += 1
    return attend(hidden, mask)


def test_a_prefix_beyond_the_budget_is_not_run(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        mask = causal()
        mask[:, :2] = True
        return big(x, weight, mask)

    monkeypatch.setattr(prefix, "_MOST_BESIDE", 100)
    monkeypatch.setattr(prefix.Prefix, "run", lambda *_: pytest.fail("it was run"))
    assert lifted(run, x, torch.randn(8, 8)).mask.predicate == (KV <= Q) | (KV < 2)


def test_without_a_prefix_what_is_not_known_is_refused(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        mask = causal()
        widen(mask)
        return big(x, weight, mask)

    def fails(*_: Any) -> Any:
        raise Unwatched("no")

    monkeypatch.setattr(prefix, "_MOST_BESIDE", 100)
    monkeypatch.setattr(mutation, "watch", fails)
    assert "`widen`" in refused(run, x, torch.randn(8, 8)).reason


def test_random_numbers_before_the_mask_are_not_drawn(x: Tensor) -> None:
    def run(x: Tensor) -> Tensor:
        hidden = F.dropout(x, 0.5, True, True)
        return attend(hidden, causal())

    captured = capture(run, x)
    state = torch.get_rng_state()
    found = lift(captured)
    assert isinstance(found, LiftedMask)
    assert found.mask.predicate == (KV <= Q)
    assert torch.equal(torch.get_rng_state(), state)


RANDOM: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(N, N) < 0.5,
    "bernoulli": lambda: torch.bernoulli(torch.full((N, N), 0.5)).bool(),
    "poisson": lambda: torch.poisson(torch.ones(N, N)) < 1,
    "numpy": lambda: torch.from_numpy(np.random.rand(N, N) < 0.5),
    "unknown": lambda: noise(torch.zeros(N, N)),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_masks_are_read_as_they_were_drawn(name: str, x: Tensor) -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        mask = RANDOM[name]() | causal()
        return attend(x, mask), mask

    made = Rewritten()
    out, mask = made.compiled(run)(x)
    torch.testing.assert_close(out, attend(x, mask))
    assert isinstance(made.decisions[0], Plan), made.decisions


@pytest.mark.parametrize("name", ["uniform_", "normal_", "exponential_"])
def test_masks_drawn_in_place_say_so(name: str, x: Tensor) -> None:
    def run(x: Tensor) -> Tensor:
        return attend(x, getattr(torch.empty(N, N), name)() < 0.5)

    found = refused(run, x)
    assert found.reason == f"its mask is random: `{name}` draws it in place"
    assert "torch.rand" in found.hint

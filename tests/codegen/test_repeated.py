"""Calls that are repeated start the same kernels with the same arguments as the whole way does."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from sparse_compile import patterns as P
from sparse_compile.codegen import repeated
from sparse_compile.codegen.generators import Generators
from sparse_compile.codegen.repeated import REPEATS, Repeat
from sparse_compile.codegen.runtime.launch import Launcher, Refused
from sparse_compile.expr import KV, N_Q, SCORE, H, Q, ScoreProgram, learned
from sparse_compile.layout import schedule
from sparse_compile.layout.lists import lists_of
from sparse_compile.ops.attention import attention, attention_backward
from tests.codegen.started import Started, is_address, noting

#: Worklists are cached by lengths: lines are split at one of them alone.
N, N_SPLIT = 96, 112
CPU = torch.device("cpu")


@pytest.fixture
def started() -> Iterator[Started]:
    """The kernels of a GPU for tensors on the CPU: what they are started with, and nothing more."""
    with noting() as notes:
        yield notes


class Problem:
    """Tensors for an attention, and the lists of its mask."""

    def __init__(self, mask: P.Pattern, heads: int = 4, strided: bool = False, n: int = N) -> None:
        self.layout = mask.layout(n, n, batch=2, heads=4, block=(32, 32))
        self.lists = lists_of(self.layout, heads, CPU)
        q, kv = [(2, h, n, 32) for h in (4, heads)]
        self.q, self.k, self.v, self.grad = (
            torch.randn(s[0], s[2], s[1], s[3]).transpose(1, 2) if strided else torch.randn(s)
            for s in (q, kv, kv, q)
        )

    def forward(self, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = attention(
            *(self.q, self.k if k is None else k, self.v, [], list(self.layout.tables), []),
            *(self.lists, 0.5, self.layout.spec.text),
        )
        return found

    def backward(self, out: Tensor, lse: Tensor) -> list[Tensor]:
        found: list[Tensor] = attention_backward(
            *(self.grad, None, out, lse, self.q, self.k, self.v, [], list(self.layout.tables), []),
            *(self.lists, 0.5, self.layout.spec.text, []),
        )
        return found

    def named(self, started: Started, results: Sequence[Tensor]) -> list[Any]:
        """What was started, with names for the addresses that are known."""
        names = {t.data_ptr(): f"result {i}" for i, t in enumerate(results)}
        given = {"q": self.q, "k": self.k, "v": self.v, "grad": self.grad}
        names |= {t.data_ptr(): name for name, t in given.items()}
        tables = dict(enumerate(self.layout.tables))
        names |= {t.data_ptr(): f"table {i}" for i, t in tables.items()}
        for number, t in enumerate(self.lists):
            names |= {t.data_ptr() + 4 * i: f"list {number}, {i}" for i in range(t.numel())}
        # What else is an address is that of memory of the call itself.
        return [
            (grid, [names.get(a, "scratch" if is_address(a) else a) for a in arguments])
            for grid, arguments in started
        ]


MASKS: dict[str, Callable[[int], P.Pattern]] = {
    "window": lambda n: P.SlidingWindow(20, 0),
    "global tokens": lambda n: P.SlidingWindow(4) | P.Global(2),
    "documents": lambda n: P.Documents(torch.arange(n) // 40) & P.Causal(),
    "each head its own": lambda n: P.Heads((P.SlidingWindow(8), P.Causal()) * 2),
}


@pytest.mark.parametrize(("heads", "strided", "are_split"), [(4, False, True), (2, True, False)])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_repeated_call_does_what_the_whole_way_does(
    mask: Callable[[int], P.Pattern],
    heads: int,
    strided: bool,
    are_split: bool,
    started: Started,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if are_split:
        monkeypatch.setattr(schedule, "LARGEST_SHARE", 0.0)
        monkeypatch.setattr(schedule, "SMALLEST_PART", 1)
    n = N_SPLIT if are_split else N
    first, second = (Problem(mask(n), heads, strided, n) for _ in range(2))

    def run(problem: Problem) -> tuple[list[Any], list[Any]]:
        started.clear()
        results = problem.forward()
        notes = problem.named(started, results)
        started.clear()
        grads = problem.backward(*results)
        notes += problem.named(started, [*results, *grads])
        return notes, [(t.shape, t.stride(), t.dtype) for t in (*results, *grads)]

    run(first)
    REPEATS.clear()
    whole_way = run(second)
    assert [type(found) for found in REPEATS.values()] == [Repeat, Repeat]
    assert (len(whole_way[0]) > 3) == are_split  # what is split is merged
    assert run(second) == whole_way
    assert run(first) == whole_way


@pytest.mark.parametrize(
    "place, places", [(KV - Q + N_Q - 1, 2 * N - 1), (KV + N_Q - 5, 2 * N)], ids=str
)
def test_gradients_of_learned_tensors_are_repeated(
    started: Started, place: sympy.Expr, places: int
) -> None:
    problem, bias = Problem(P.SlidingWindow(20, 0)), torch.randn(4, places)
    score = ScoreProgram(SCORE + learned(0)(H, place), ("float32",))
    spec = replace(problem.layout.spec, score=score).text
    out, lse = problem.forward()

    def run() -> list[Any]:
        started.clear()
        grads = attention_backward(
            *(problem.grad, None, out, lse, problem.q, problem.k, problem.v, [bias], [], []),
            *(problem.lists, 0.5, spec, [0]),
        )
        assert grads[3].shape == bias.shape
        return problem.named(started, [out, lse, bias, *grads])

    REPEATS.clear()
    whole_way = run()
    (found,) = REPEATS.values()
    assert isinstance(found, Repeat)
    # Queries and biases, keys and values, and what adds up the sums, which begin as zeros.
    assert len(whole_way) == 3
    assert [memory.zero for memory in found.memory] == [False] * 4 + [False, True]
    assert run() == whole_way


def test_what_is_repeated_holds_no_memory(started: Started) -> None:
    problem = Problem(P.SlidingWindow(20, 0))
    problem.backward(*problem.forward())
    assert [type(found) for found in REPEATS.values()] == [Repeat, Repeat]
    operands = problem.q, problem.k, problem.v, problem.grad
    seen = [weakref.ref(t) for t in operands]
    del problem, operands
    gc.collect()
    assert [one() for one in seen] == [None] * 4


def test_other_tensors_are_another_kind(started: Started) -> None:
    problem, strided = Problem(P.SlidingWindow(20, 0)), Problem(P.SlidingWindow(20, 0), 4, True)
    for made, kinds in ((problem, 1), (problem, 1), (strided, 2)):
        made.forward()
        assert len(REPEATS) == kinds


def test_one_tensor_for_two_operands_does_not_make_them_one(started: Started) -> None:
    problem = Problem(P.SlidingWindow(20, 0))
    for _ in range(2):
        problem.forward(k=problem.v)
        assert not any(isinstance(found, Repeat) for found in REPEATS.values())
    problem.forward()
    started.clear()
    out, lse = problem.forward()
    ((_, arguments),) = problem.named(started, (out, lse))
    assert {"q", "k", "v"} <= {a for a in arguments if isinstance(a, str)}


def test_calls_that_do_more_are_not_repeated(started: Started) -> None:
    """A negative scale changes the sign of the queries first; it is asked a few times, no more."""
    problem = Problem(P.SlidingWindow(20, 0))
    negative = [problem.q, problem.k, problem.v, [], [], [], problem.lists]
    for call in range(5):
        started.clear()
        attention(*negative, -0.5, problem.layout.spec.text)
        assert len(started) == 1
        assert list(REPEATS.values()) == [min(call + 1, 3)]


def test_a_call_during_which_a_kernel_is_refused_is_not_repeated(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, launched = Problem(P.SlidingWindow(20, 0)), Launcher.launched

    def refused(self: Launcher, grid: tuple[int, ...], arguments: Sequence[Any]) -> Any:
        monkeypatch.setattr(Launcher, "launched", launched)
        raise Refused("too large")

    monkeypatch.setattr(Launcher, "launched", refused)
    monkeypatch.setattr(Generators, "refuse", lambda self, spec, why: None)
    problem.forward()
    assert list(REPEATS.values()) == [1]
    problem.forward()
    assert [type(found) for found in REPEATS.values()] == [Repeat]


def test_a_part_of_a_call_is_watched_with_it(started: Started) -> None:
    problem = Problem(P.SlidingWindow(20, 0))
    problem.forward()

    def kind(q: Tensor) -> repeated.Kind:
        return [q], [], ()

    twice = repeated.repeated(kind)(lambda q: list(problem.forward()))
    for _ in range(3):
        started.clear()
        twice(problem.q)
        assert len(started) == 1


def test_the_cpu_has_nothing_to_repeat() -> None:
    problem = Problem(P.SlidingWindow(20, 0))
    known = len(REPEATS)
    problem.forward()
    assert len(REPEATS) == known

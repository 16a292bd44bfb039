"""Worklists: every block of every line exactly once, heavy lines split, no worker idle."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_compile.layout.block_layout import Load
from sparse_compile.layout.schedule import LARGEST_SHARE, SMALLEST_PART, make_schedule

ROOMS = st.lists(st.integers(0, 2000), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(ROOMS, st.integers(1, 64), st.integers(1, 300))
def test_items_cover_every_line_once(rooms: list[int], members: int, workers: int) -> None:
    schedule = make_schedule(torch.tensor(rooms), members, workers)
    covered: dict[int, list[tuple[int, int]]] = {}
    slots = []
    for line, lo, hi, slot in schedule.items.tolist():
        covered.setdefault(line, []).append((lo, hi))
        if slot >= 0:
            slots.append(slot)
    assert sorted(covered) == list(range(len(rooms)))
    for line, ranges in covered.items():
        ranges.sort()
        assert ranges[0][0] == 0
        assert ranges[-1][1] >= rooms[line]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert sorted(slots) == list(range(schedule.slots))


@settings(max_examples=200, deadline=None)
@given(ROOMS, st.integers(1, 64), st.integers(1, 300))
def test_merges_name_the_slots_of_their_line(rooms: list[int], members: int, workers: int) -> None:
    schedule = make_schedule(torch.tensor(rooms), members, workers)
    slots: dict[int, set[int]] = {}
    for line, _, _, slot in schedule.items.tolist():
        if slot >= 0:
            slots.setdefault(line, set()).add(slot)
    merges = {line: (first, n) for line, first, n in schedule.merges.tolist()}
    assert slots == {line: set(range(first, first + n)) for line, (first, n) in merges.items()}


@settings(max_examples=100, deadline=None)
@given(ROOMS, st.integers(1, 64), st.integers(1, 300))
def test_no_part_is_larger_than_a_share(rooms: list[int], members: int, workers: int) -> None:
    schedule = make_schedule(torch.tensor(rooms), members, workers)
    share = (sum(rooms) + 2 * len(rooms)) * members / workers
    most = max(SMALLEST_PART, int(share * LARGEST_SHARE))
    assert int(schedule.costs.max()) - 2 <= most


@pytest.mark.parametrize("heads", [1, 4, 16])
def test_a_global_row_leaves_no_worker_idle(heads: int) -> None:
    """The row of global tokens of a Longformer at 64k: 100 times as long as the others."""
    rooms = torch.full([1024], 10)
    rooms[0] = 1024
    schedule = make_schedule(rooms, heads, 264)
    assert schedule.slots > 1
    assert schedule.utilisation(heads, 264) >= 0.9 if heads > 1 else True
    whole = make_schedule(rooms, heads, 1)  # a single worker needs no split
    assert whole.slots == 0
    assert whole.utilisation(heads, 264) < schedule.utilisation(heads, 264)


def test_costs_fall() -> None:
    schedule = make_schedule(torch.arange(1000) ** 2 // 1000, 1, 4)
    costs = schedule.costs[schedule.heavy :]
    # Levels are coarse on purpose, so that neighbours stay together.
    assert (costs.diff() <= int(costs.max()) // 8 + 1).all()
    assert costs[0] > costs[-1]


def test_even_lines_keep_their_order_the_last_first() -> None:
    schedule = make_schedule(torch.tensor([3, 4, 5, 6]), 1, 1)
    assert schedule.items[:, 0].tolist() == [3, 2, 1, 0]
    assert schedule.costs.tolist() == [8, 7, 6, 5]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=60),
    st.integers(0, 50),
    st.integers(0, 9),
    st.integers(1, 64),
    st.integers(1, 300),
)
def test_bounds_of_a_load_never_change_the_worklist(
    rooms: list[int], slack: int, more: int, members: int, workers: int
) -> None:
    lines = torch.tensor(rooms)
    exact = make_schedule(lines, members, workers)
    bounds = Load(len(rooms), (max(sum(rooms) - slack, 0), max(rooms) + more), lambda: lines)
    found = make_schedule(bounds, members, workers)
    assert torch.equal(found.items, exact.items)
    assert torch.equal(found.costs, exact.costs)


def test_an_even_load_asks_nobody_for_its_lines() -> None:
    def asked() -> torch.Tensor:
        raise AssertionError

    assert make_schedule(Load(100, (900, 10), asked), 16, 264).slots == 0

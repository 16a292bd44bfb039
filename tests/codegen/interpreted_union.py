"""The forward over unions of lists, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile.codegen.triton.selected import united
from sparse_compile.codegen.triton.selected.union_lists import unite
from sparse_compile.selection import canonical
from tests.codegen.interpreted_selected import CASES, SMALL
from tests.selection.cases import PER_HEAD, Case
from tests.selection.united import COSTS, DECIDED, writers

pytestmark = pytest.mark.usefixtures("interpreted_kernels")

SERVED = [
    *(case for case in CASES if case.unit_kv >= 16 and case.dim <= 256 and case.scale is None),
    Case("mask by head, groups of 3", q_heads=6, mask=PER_HEAD, **SMALL),
]


@st.composite
def lists(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Indices [B, lists, units, most], units of keys, and how many neighbours are united."""
    shape = [draw(st.integers(1, most)) for most in (2, 2, 9, 5)]
    units, neighbours = draw(st.integers(1, 12)), draw(st.integers(2, 32))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, units + 1, shape, generator=generator), units, neighbours


@settings(max_examples=20, deadline=None)
@given(lists())
def test_unions_are_those_of_sets(drawn: tuple[Tensor, int, int]) -> None:
    given_index, units, neighbours = drawn
    index, count = canonical(given_index, units)
    found = unite(index, count, neighbours, (10, 16))
    entries = united_entries = 0
    for place in torch.cartesian_prod(*(torch.arange(n) for n in found.count.shape)):
        b, s, union = place.tolist()
        names: dict[int, int] = {}
        for g, unit in enumerate(range(union * neighbours, (union + 1) * neighbours)):
            if unit < index.shape[2]:
                for named in index[b, s, unit, : count[b, s, unit]].tolist():
                    names[named] = names.get(named, 0) | 1 << g
                    entries += 1
        n = int(found.count[b, s, union])
        united_entries += n
        bits = found.names[b, s, union, :n].tolist()
        assert found.index[b, s, union, :n].tolist() == sorted(names)
        assert [bit & 0xFFFFFFFF for bit in bits] == [names[named] for named in sorted(names)]
    assert found.balance.tolist() == [16 * united_entries - 10 * entries]


@pytest.mark.parametrize(
    ("case", "writer"), [*((case, "union") for case in SERVED), (SERVED[0], "query")], ids=str
)
def test_case(case: Case, writer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(united, "COSTS", COSTS[writer])
    assert writers(case, torch.device("cpu"), torch.float32) == {writer}


def test_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(united, "COSTS", COSTS["union"])
    assert writers(SERVED[0], torch.device("cpu"), torch.bfloat16) == {"union"}


@pytest.mark.parametrize(("case", "writer"), DECIDED, ids=str)
def test_the_lists_decide(case: Case, writer: str) -> None:
    assert writers(case, torch.device("cpu"), torch.float32) == {writer}


@pytest.mark.parametrize(
    "case", [CASES[1], replace(SERVED[0], n_q=1), replace(SERVED[0], most=200)], ids=str
)
def test_where_it_does_not_serve(case: Case) -> None:
    """Units too short to fill a tile, a single list, and lists too long to sort."""
    assert writers(case, torch.device("cpu"), torch.float32) == {"query alone"}

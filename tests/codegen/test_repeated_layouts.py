"""Layouts that calls make are repeated: the same launches, a few operations, and no old memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from sparse_compile.codegen.repeated import REPEATS, Repeat
from sparse_compile.expr import KV, B, MaskExpr, Q, size_symbol, table
from sparse_compile.layout import Schedule
from sparse_compile.layout import build as host
from sparse_compile.layout.builders import BUILDERS
from sparse_compile.layout.from_dense import NO_READS
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.layout.views.split_views import choose_views
from sparse_compile.ops.registered import RUN
from sparse_compile.spec import AttentionSpec
from tests.codegen.started import Operations, Started, is_address, noting
from tests.handed_in import serve_the_cpu

BATCH, HEADS, N, CPU = 2, 4, 1280, torch.device("cpu")
DOCUMENTS = sympy.Eq(table(0)(B, Q), table(0)(B, KV))
NEAR = sympy.Abs(Q - KV) < 8
#: What compiled code calls.
RUN_LAYOUT = getattr(torch.ops.sparse_compile.layout, RUN)


def documents() -> Tensor:
    return torch.randint(0, 9, (BATCH, N)).sort(-1)[0]


def real() -> Tensor:
    return torch.arange(N) < torch.randint(1, N, (BATCH, 1))


#: A mask, its table, and how many lookups are bounded.
MASKS: dict[str, tuple[MaskExpr, Any, int]] = {
    "documents": (MaskExpr((KV <= Q) & DOCUMENTS, ("int64",)), documents, 2),
    "a global token": (MaskExpr(DOCUMENTS & (NEAR | (KV < 1) | (Q < 1)), ("int64",)), documents, 2),
    "padding": (MaskExpr(sympy.Ne(table(0)(B, KV), 0), ("bool",)), real, 1),
    "window of padding": (
        MaskExpr(NEAR & sympy.Ne(table(0)(B, Q), 0) & sympy.Ne(table(0)(B, KV), 0), ("bool",)),
        *(real, 2),
    ),
    "up to a number": (
        MaskExpr(KV <= table(0)(B), ("int32",)),
        *(lambda: torch.randint(0, N, (BATCH,), dtype=torch.int32), 0),
    ),
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    serve_the_cpu(BUILDERS, monkeypatch)
    monkeypatch.setattr(host, "_agrees", lambda *_: True)  # kernels do nothing here
    with noting(workers=64) as notes:
        yield notes


def spec_of(mask: MaskExpr) -> AttentionSpec:
    return choose_views(mask, ProblemShape(1, 1, 2000, 2000), (32, 32))[0]


def listed(mask: MaskExpr, data: Tensor, sizes: tuple[int, ...] = ()) -> list[Tensor]:
    lengths = BATCH, HEADS, N, N, HEADS
    found: list[Tensor] = RUN_LAYOUT(
        *([data], NO_READS, sizes, *lengths, spec_of(mask).text, CPU, []),
    )
    return found


def named(started: Started, data: Tensor, results: list[Tensor]) -> list[Any]:
    """What was started, with names for the addresses that are known."""
    names = {data.data_ptr(): "table"}
    for number, t in enumerate(results):
        names |= {t.data_ptr() + 4 * i: f"result {number}, {i}" for i in range(t.numel())}
    return [
        (grid, [names.get(a, "scratch" if is_address(a) else a) for a in arguments])
        for grid, arguments in started
    ]


@pytest.mark.parametrize("name", MASKS)
def test_a_repeated_layout_starts_what_the_whole_way_does(name: str, started: Started) -> None:
    mask, data, _ = MASKS[name]

    def run() -> tuple[list[Any], list[Any]]:
        given = data()
        started.clear()
        results = listed(mask, given)
        shapes = [(t.shape, t.stride(), t.dtype) for t in results]
        return named(started, given, results), shapes

    run()  # worklists are made
    REPEATS.clear()
    whole_way = run()
    assert [type(found) for found in REPEATS.values()] == [Repeat]
    assert any("result 0, 0" in arguments for _, arguments in whole_way[0])
    assert run() == whole_way
    assert run() == whole_way


@pytest.mark.parametrize("name", MASKS)
def test_a_repeated_layout_takes_few_operations(name: str, started: Started) -> None:
    """It asks for its results and for bounds of lookups, and copies the two worklists."""
    mask, data, lookups = MASKS[name]
    for _ in range(2):
        listed(mask, data())
    given, operations = data(), Operations()
    with operations:
        results = listed(mask, given)
    assert len(results) == 5
    assert operations.seen == {"empty_strided": 5 + lookups, "copy_": 2}


@pytest.mark.parametrize("name", MASKS)
def test_worklists_are_new_each_time(name: str, started: Started) -> None:
    mask, data, _ = MASKS[name]
    first, *others = (listed(mask, data())[1:] for _ in range(4))
    kept = [t.clone() for t in first]
    assert first[0].any()
    for lists in (first, *others):
        assert all(map(torch.equal, lists, kept))
        for t in lists:
            t.zero_()
    schedules = [Schedule.unpack(*kept[i : i + 2]) for i in (0, 2)]
    assert name != "a global token" or all(work.slots for work in schedules)


def test_what_depends_on_sizes_is_not_repeated(started: Started) -> None:
    """Their kernels would be tried for each value, so torch's operations make these."""
    mask = MaskExpr((KV <= Q) & (Q - KV < size_symbol(0)) & DOCUMENTS, ("int64",), 1)
    for call in range(5):
        listed(mask, documents(), (20,))
        assert list(REPEATS.values()) == [min(call + 1, 3)]


def test_mask_tensors_and_selections_are_no_kind(started: Started) -> None:
    spec = AttentionSpec.of_listed_blocks(MaskExpr(KV <= Q), 32, 32)
    index = torch.zeros(BATCH, HEADS, N // 32, 1, dtype=torch.int32)
    given = [], NO_READS, [], BATCH, HEADS, N, N, HEADS, spec.text, CPU
    for _ in range(2):
        RUN_LAYOUT(*given, [index, torch.ones_like(index[..., 0])])
    assert not REPEATS

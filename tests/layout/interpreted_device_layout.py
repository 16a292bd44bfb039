"""The kernels that list blocks, in Triton's interpreter."""

from __future__ import annotations

import pytest
import sympy
import torch

from sparse_compile.codegen.triton.layout import build
from sparse_compile.codegen.triton.layout.build import DeviceProblem
from sparse_compile.expr import KV, B, MaskExpr, Q, table
from sparse_compile.expr.nodes import size_symbol
from sparse_compile.layout import build as host
from sparse_compile.layout.builders import BUILDERS
from sparse_compile.layout.superset import Problem, ProblemShape
from tests.handed_in import serve_the_cpu
from tests.layout.device_cases import CASES, DeviceCase, check, check_packed

pytestmark = pytest.mark.usefixtures("interpreted_kernels")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lines_that_visit_few_blocks(case: DeviceCase) -> None:
    check(case, CPU)


#: Each kind of order and of data, and lines that are short, long and empty. What a line visits is
#: found as in the test above; where it is written is the same for all masks.
CROWDED = {
    *("causal", "nothing", "everything", "several groups of spans", "global tokens", "documents"),
    *("padding", "per-head window", "pairs", "all at once", "causal residues", "tiles", "boxes"),
}


@pytest.mark.parametrize("case", [case for case in CASES if case.name in CROWDED], ids=str)
def test_lines_that_visit_more_than_there_is_room_for(
    case: DeviceCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_WIDTH", 2)
    check(case, CPU)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in CROWDED], ids=str)
def test_lists_in_one_vector(case: DeviceCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the vector alone: nothing fills it before."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **named: empty(*args, **named).fill_(77))
    check_packed(case, CPU)


def test_no_room_is_taken_where_lines_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_MOST_PLACES", 100)
    rows = DeviceProblem.of(window(400), [], CPU).rows()
    assert rows.index.numel() == rows.counts.sum()
    assert torch.equal(rows.start.diff(), rows.counts.sum(-1)[0])


def test_nothing_to_attend_to() -> None:
    given = Problem.of(MaskExpr(KV <= Q), ProblemShape(1, 1, 20, 0), (8, 8))
    problem = DeviceProblem.of(given, [], CPU)
    rows, cols = problem.rows(), problem.cols()
    assert rows.counts.tolist() == [[[0, 0]] * 3]
    assert rows.index.shape == (1, 0)
    assert cols.counts.shape == (1, 0, 2)
    assert cols.start.tolist() == [0]
    packed = given.unpacked(problem.packed().pack())
    assert packed.rows.counts.tolist() == [[[0, 0]] * 3]
    assert packed.rows.index.shape == (1, 0)
    assert packed.rows.start.tolist() == [0] * 4


WINDOW = MaskExpr((KV <= Q) & (Q - KV < 20))
CPU = torch.device("cpu")


def window(n: int) -> Problem:
    return Problem.of(WINDOW, ProblemShape(1, 1, n, n), (8, 8))


def test_kernels_are_tried_before_they_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_TRUSTED", {})
    serve_the_cpu(BUILDERS, monkeypatch)
    problem = window(100)
    layout = host.device_layout(problem, [], CPU)
    assert list(host._TRUSTED.values()) == [True]
    assert torch.equal(layout.kinds(), host._by_cpu(problem, []).kinds())
    assert layout.rows.load is not None
    assert layout.cols.load is not None


def test_kernels_that_are_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_TRUSTED", {})
    serve_the_cpu(BUILDERS, monkeypatch)
    rows = DeviceProblem.rows

    def wrong(self: DeviceProblem) -> object:
        lists = rows(self)
        lists.index[0, 0] += 1
        return lists

    monkeypatch.setattr(DeviceProblem, "rows", wrong)
    problem = window(100)
    with pytest.warns(UserWarning, match="the CPU lists them"):
        layout = host.device_layout(problem, [], CPU)
    assert torch.equal(layout.kinds(), host._by_cpu(problem, []).kinds())
    assert layout.rows.load is not None
    assert layout.cols.load is not None


def test_kernels_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding in two sequences: the blocks are the CPU's, and no load is known."""
    monkeypatch.setattr(host, "_TRUSTED", {})
    serve_the_cpu(BUILDERS, monkeypatch)
    mask = MaskExpr(WINDOW.predicate & sympy.Ne(table(0)(B, KV), 0), ("bool",))
    real = torch.arange(100) < torch.tensor([[70], [100]])
    problem = Problem.of(mask, ProblemShape(2, 3, 100, 100), (8, 8))
    layout = host.quick_layout(problem, [real], CPU)
    assert layout is not None
    assert torch.equal(layout.kinds(), host._by_cpu(problem, [real]).kinds())
    assert layout.rows.load is None
    assert layout.cols.load is None
    packed = problem.unpacked(layout.pack())
    assert torch.equal(packed.kinds(), layout.kinds())


def test_some_layouts_are_not_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for all blocks, and where kernels would be tried in each call."""
    serve_the_cpu(BUILDERS, monkeypatch)
    mask = MaskExpr((KV <= Q) & (Q - KV < size_symbol(0)), n_sizes=1)
    sized = Problem.of(mask, ProblemShape(1, 1, 100, 100), (8, 8), (20,))
    assert host.quick_layout(sized, [], CPU) is None
    assert host.quick_layout(window(8 << 14), [], CPU) is None

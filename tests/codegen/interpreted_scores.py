"""Score programs in Triton's interpreter."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import triton

from sparse_compile.codegen.runtime.generated import load_module
from sparse_compile.codegen.triton import calls
from sparse_compile.codegen.triton.predicate import Printed
from sparse_compile.codegen.triton.score import print_score
from sparse_compile.codegen.triton.selected import executor as selected_executor
from sparse_compile.codegen.triton.text import common
from sparse_compile.expr import ScoreProgram, evaluate_slope
from tests.codegen.kernel_cases import Case, check
from tests.codegen.score_cases import CASES
from tests.codegen.test_score_programs import PROGRAMS, SELECTED
from tests.selection.cases import Case as SelectedCase
from tests.selection.cases import check_executor

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("interpreted_kernels")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case) -> None:
    check(case, CPU)


@pytest.mark.parametrize("case", SELECTED, ids=str)
def test_selected(case: SelectedCase) -> None:
    check_executor(selected_executor, case, CPU, torch.float32)


@pytest.mark.parametrize("case", SELECTED[:2], ids=str)
def test_selected_keys_outermost(case: SelectedCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "PREPARED", {})
    monkeypatch.setattr(selected_executor, "is_by_key", lambda launch: True)
    monkeypatch.setattr(selected_executor, "_STRETCH", (16, 16))
    monkeypatch.setattr(selected_executor, "_ENTRIES", 8)
    check_executor(selected_executor, case, CPU, torch.float32)


_MODULE = """\
import triton
import triton.language as tl


{helpers}

@triton.jit
def apply(SCORES, VALUES, SLOPES, scale, N: tl.constexpr):
    at = tl.arange(0, N)
    score = tl.load(SCORES + at)
    {lines}
    tl.store(VALUES + at, score)
    tl.store(SLOPES + at, slope + score * 0.0)
"""


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_printed_programs_are_what_is_evaluated(program: ScoreProgram, tmp_path: Path) -> None:
    printed = print_score(
        program, (), "kv", Printed((), (), "", frozenset()), {"slope": program.derivative}
    )
    lines = "\n    ".join([*printed.before, *printed.slope])
    helpers = "\n\n".join(common.HELPERS[name] for name in sorted(printed.helpers))
    module = load_module("printed_score", _MODULE.format(helpers=helpers, lines=lines))
    scores = torch.linspace(-60, 60, 4096)
    values, slopes = torch.empty(4096), torch.empty(4096)
    module.apply[(1,)](scores, values, slopes, 0.5, N=4096)
    truth, slope = evaluate_slope(program, scores.double() * 0.5)
    torch.testing.assert_close(values.double(), truth, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(slopes.double(), slope, rtol=3e-6, atol=3e-6)


def test_tanh_is_exact_to_three_units_in_the_last_place() -> None:
    module = load_module(
        "printed_tanh",
        _MODULE.format(
            helpers=common.HELPERS["tanh"], lines="slope = 1.0\n    score = tanh(score)"
        ),
    )
    size = torch.logspace(-30, 30, 4095, dtype=torch.float64).float()
    x = torch.cat([size, torch.zeros(1), -size, torch.full((1,), -math.inf)])
    found, unused = torch.empty_like(x), torch.empty_like(x)
    module.apply[(1,)](x, found, unused, 1.0, N=triton.next_power_of_2(x.numel()))
    truth = torch.tanh(x.double())
    rounded = truth.abs().float()
    unit = (torch.nextafter(rounded, torch.full_like(rounded, math.inf)) - rounded).double()
    assert ((found.double() - truth).abs() / unit).max() <= 3

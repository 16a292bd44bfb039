"""A thousand random programs, always the same: equal to eager, and most are rewritten."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # where a plain `pytest` does not look

from benchmarks.fuzz.__main__ import fuzzed, line, part
from benchmarks.fuzz.results import read

ROOT = Path(__file__).parents[2]
COUNT = 1000
#: Half a minute of a core, each.
PARTS = 16
#: Of all attentions; of so few as a part has, some less.
LEAST, LEAST_OF_A_PART = 0.9, 0.8


@pytest.mark.parametrize("number", range(1, PARTS + 1))
def test_programs_equal_eager(number: int) -> None:
    """Mismatches are printed; ``python -m benchmarks.fuzz --shrink SEED`` shortens one."""
    *_, summary = fuzzed(part(0, COUNT, f"{number}/{PARTS}"))
    for wrong in summary.mismatches:
        print(wrong.source, f"# seed {wrong.seed}: {wrong.seen}", sep="\n")
    assert [(wrong.seed, wrong.seen) for wrong in summary.mismatches] == []
    assert summary.share >= LEAST_OF_A_PART, summary.left


def test_the_committed_run() -> None:
    summary = read(ROOT / "benchmarks" / "results" / "fuzz.json")
    assert summary.programs >= 20_000
    assert summary.mismatches == ()
    assert summary.share >= LEAST, line(summary)
    assert summary.inductor >= summary.programs // 100

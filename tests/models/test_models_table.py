"""A part of the survey of models, another one for each commit: exact, and rewritten as it says."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # where a plain `pytest` does not look

from benchmarks.models.__main__ import part
from benchmarks.models.check import Case, Result, check, units
from benchmarks.models.entry import Entry
from benchmarks.models.results import of_case, read
from benchmarks.models.zoo import ENTRIES, version

ROOT = Path(__file__).parents[2]
#: Two to three minutes of a core, each.
PARTS = 16


def commits() -> int:
    """How many there are: the same number in every process of a run."""
    count = ["git", "rev-list", "--count", "HEAD"]
    done = subprocess.run(count, cwd=ROOT, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0


@functools.cache
def committed() -> dict[tuple[str, str, str], Result]:
    return of_case(read(ROOT / "benchmarks" / "results" / "models.json").results)


@pytest.mark.parametrize(
    "entry, implementation, case",
    part(units(ENTRIES.values()), f"{commits() % PARTS + 1}/{PARTS}"),
    ids=lambda value: getattr(value, "name", value),
)
def test_case(entry: Entry, implementation: str, case: Case) -> None:
    if version(entry.package) is None:
        pytest.skip(f"needs {entry.package}")
    result = check(entry, implementation, case)
    assert not result.error
    assert result.ok, result.exactness
    known = committed()[entry.name, implementation, case.name]
    both = zip(known.sites, result.sites, strict=True)
    assert [now.reason for was, now in both if was.rewritten and not now.rewritten] == []

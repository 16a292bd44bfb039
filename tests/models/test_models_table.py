"""A part of the survey of models, another one for each commit: exact, and rewritten as it says."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # where a plain `pytest` does not look

from benchmarks.models.__main__ import part
from benchmarks.models.check import Case, Result, check, units
from benchmarks.models.entry import Entry
from benchmarks.models.results import of_case, read
from benchmarks.models.zoo import ENTRIES, version
from tests.rotation import commits

ROOT = Path(__file__).parents[2]
#: Half a minute of a core, or one, each.
PARTS = 64


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

"""Every test has its turn, and a run of the whole leaves out those that have not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.rotation import PARTS, has_turn

TESTS = Path(__file__).parents[1]


def test_every_test_has_its_turn_once() -> None:
    names = [f"test_it[{number}]" for number in range(20)]
    for file, parts in PARTS.items():
        turns = Counter(n for turn in range(parts) for n in names if has_turn(file, n, turn))
        assert turns == Counter(names)


def test_parts_are_of_files() -> None:
    assert set(PARTS) <= {path.stem for path in TESTS.rglob("*.py")}


def test_other_files_always_run() -> None:
    assert all(has_turn("test_rotation", "test_it", turn) for turn in range(4))

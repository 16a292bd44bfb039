"""Run interpreted_listed.py where Triton interprets."""

from __future__ import annotations

from pathlib import Path

from tests.interpreted import passed_in_the_interpreter


def test_listed_blocks_agree_with_fp64_in_the_interpreter(tmp_path: Path) -> None:
    passed = passed_in_the_interpreter("tests/selection/interpreted_listed.py", tmp_path)
    assert passed == 12

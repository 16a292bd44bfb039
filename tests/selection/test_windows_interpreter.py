"""Run interpreted_windows.py where Triton interprets."""

from __future__ import annotations

from pathlib import Path

from tests.interpreted import passed_in_the_interpreter


def test_the_kernel_scores_as_torch_does(tmp_path: Path) -> None:
    assert passed_in_the_interpreter("tests/selection/interpreted_windows.py", tmp_path) == 30

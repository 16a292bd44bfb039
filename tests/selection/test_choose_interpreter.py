"""Run interpreted_choose.py where Triton interprets."""

from __future__ import annotations

from pathlib import Path

from tests.interpreted import passed_in_the_interpreter


def test_the_kernel_chooses_what_torch_does(tmp_path: Path) -> None:
    assert passed_in_the_interpreter("tests/selection/interpreted_choose.py", tmp_path) == 64

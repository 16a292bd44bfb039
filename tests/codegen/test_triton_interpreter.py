"""Run interpreted_kernels.py where Triton interprets."""

from __future__ import annotations

from pathlib import Path

from tests.interpreted import passed_in_the_interpreter


def test_kernels_agree_with_fp64_in_the_interpreter(tmp_path: Path) -> None:
    assert passed_in_the_interpreter("tests/codegen/interpreted_kernels.py", tmp_path) >= 17

"""Run interpreted_selected.py where Triton interprets: that is decided when triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_kernels_agree_with_fp64_in_the_interpreter(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "SPARSE_COMPILE_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    cases = "tests/codegen/interpreted_selected.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) == 13

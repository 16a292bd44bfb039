"""Run a file of tests where Triton interprets: that is decided when triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def passed_in_the_interpreter(cases: str, cache: Path) -> int:
    """Run a file of tests in a process of its own; all must pass and none be skipped.

    Args:
        cases: path of the file, from the root of the repository.
        cache: folder for the generated kernels.

    Returns:
        how many passed.
    """
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "SPARSE_COMPILE_CACHE_DIR": str(cache),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    return int(passed[1])

"""Tests that take turns: of those that repeat one meaning at many shapes, a part per commit.

``pytest`` without paths is what everybody runs on the whole, CI too. What it leaves out of a file
runs with the next commits; ``pytest tests``, and any path or name given, leaves out nothing.
"""

from __future__ import annotations

import functools
import subprocess
import zlib
from pathlib import Path

#: Into how many parts the tests of files are divided.
PARTS: dict[str, int] = {}


@functools.cache
def commits() -> int:
    """How many there are: the same number in every process of a run."""
    count = ["git", "rev-list", "--count", "HEAD"]
    root = Path(__file__).parents[1]
    done = subprocess.run(count, cwd=root, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0


def has_turn(file: str, name: str, turn: int) -> bool:
    """Whether a test runs now.

    Args:
        file: name of its file, without ``.py``.
        name: of the test, with its parameters.
        turn: which part of each file runs, modulo how many it has.
    """
    parts = PARTS.get(file, 1)
    return zlib.crc32(name.encode()) % parts == turn % parts

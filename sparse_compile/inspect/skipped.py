"""The fence around what torch.compile says of code that it gave up on.

``tests/project/test_fences.py`` says what is relied upon of ``torch._dynamo``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._dynamo.utils import counters, get_compilation_metrics


@contextmanager
def frames_skipped() -> Iterator[list[str]]:
    """Collect which functions run as plain Python, and why: filled when the context ends.

    Each as ``forward, model.py:12: Failed to trace builtin operator (model.py:20)``. Only
    meaningful where no graph was captured.
    """
    found: list[str] = []
    known = {id(one) for one in get_compilation_metrics()}
    breaks = counters["graph_break"].copy()
    try:
        yield found
    finally:
        new = [_first_line(reason) for reason in counters["graph_break"] - breaks]
        why = "; ".join(new) or "there is nothing in it to capture"
        seen = (one for one in get_compilation_metrics() if id(one) not in known)
        found += dict.fromkeys(_shown(one, why) for one in seen)


def _shown(one: Any, why: str) -> str:
    reason = why if one.fail_reason is None else _first_line(one.fail_reason)
    line = one.fail_user_frame_lineno
    at = f" ({os.path.basename(one.fail_user_frame_filename)}:{line})" if line else ""
    return f"{one.co_name}, {os.path.basename(one.co_filename)}:{one.co_firstlineno}: {reason}{at}"


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0].strip()

"""The fence around running our own tensor code while torch.compile traces the user's.

Plans are worked out on the host with small tensors, which must be real ones and stand in no graph.
``tests/project/test_fences.py`` says what is relied upon.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils._python_dispatch import _disable_current_modes

Run = TypeVar("Run", bound=Callable[..., Any])


def untraced(run: Run) -> Run:
    """A function of plain values that is never traced."""

    @functools.wraps(run)
    def outside(*args: Any) -> Any:
        with _disable_current_modes():
            return run(*args)

    return outside  # type: ignore[return-value]

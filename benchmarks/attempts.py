"""Calls that may fail, take too long or too much memory, which is a result like any other."""

from __future__ import annotations

import contextlib
import gc
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


class OutOfTime(Exception):
    """The seconds of a problem are over."""


@dataclass
class Budget:
    """Seconds that calls may take together; what passes between them does not count."""

    left: float


def attempted(call: Callable[[], Any], budget: Budget) -> tuple[Any, str]:
    """What a call returns, and why not; nothing of what failed stays in memory."""
    try:
        with _limited(budget):
            return call(), ""
    except torch.OutOfMemoryError:
        why = "out of memory"
    except OutOfTime:
        why = "out of time"
    except Exception as error:
        why = _told(error)
    free()
    return None, why


def _told(error: Exception) -> str:
    """An error in a line; torch.compile wraps those of what it runs."""
    text = "".join(traceback.format_exception_only(error)).strip()
    if "out of memory" in text.lower():
        return "out of memory"
    if OutOfTime.__name__ in text:
        return "out of time"
    return " ".join(text.split())[:400]


@contextlib.contextmanager
def _limited(budget: Budget) -> Iterator[None]:
    """Raise :class:`OutOfTime` in what runs too long, as far as Python is asked there."""
    if budget.left <= 0:
        raise OutOfTime
    began = time.monotonic()

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, budget.left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        budget.left -= time.monotonic() - began


def clean() -> None:
    """Forget what was compiled, and free what it held."""
    torch._dynamo.reset()
    free()


def free() -> None:
    """Give the memory of the GPU back, if it still works."""
    if torch.cuda.is_available():
        gc.collect()
        with contextlib.suppress(torch.AcceleratorError):
            torch.cuda.empty_cache()

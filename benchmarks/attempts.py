"""Calls that may fail, take too long or too much memory, which is a result like any other."""

from __future__ import annotations

import contextlib
import gc
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch


class OutOfTime(Exception):
    """The seconds of a problem are over."""


def attempted(call: Callable[[], Any], until: float) -> tuple[Any, str]:
    """What a call returns, and why not; nothing of what failed stays in memory."""
    try:
        with _limited(until):
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
    return text.splitlines()[0][:300]


@contextlib.contextmanager
def _limited(until: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` in what runs too long, as far as Python is asked there."""
    left = until - time.monotonic()
    if left <= 0:
        raise OutOfTime

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def clean() -> None:
    """Forget what was compiled, and free what it held."""
    torch._dynamo.reset()
    free()


def free() -> None:
    """Give the memory of the GPU back."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()

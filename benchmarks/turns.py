"""Processes that share a GPU: preparations run beside one another, measurements alone."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Turns:
    """Turns at a GPU, by locks on a file that all processes name; without one there are no others.

    Who measures waits until nobody prepares, and who prepares until nobody measures.
    """

    path: str = ""

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Within it others may prepare, too."""
        with self._held(fcntl.LOCK_SH):
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within it nobody else uses the GPU."""
        with self._held(fcntl.LOCK_EX):
            yield

    @contextlib.contextmanager
    def _held(self, kind: int) -> Iterator[None]:
        if not self.path:
            yield
            return
        with open(self.path, "a") as file:
            fcntl.flock(file, kind)
            yield

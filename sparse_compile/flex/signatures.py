"""What has the signature of a function of torch, as a mark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def like_torch(function: F) -> F:
    """Marks a function whose parameters are those of one of torch; it stays as it is."""
    return function

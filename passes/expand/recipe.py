"""Recipe: the Python function that computes what an opaque call does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """A function of torch calls, and its arguments.

    Attributes:
        function: it returns a result of the call, or the tuple of them.
        args, kwargs: nodes, and what needs none.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

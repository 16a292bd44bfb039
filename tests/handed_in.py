"""Kernels of a GPU for tensors on the CPU, where Triton interprets them; or kernels for none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import sparse_compile.ops  # noqa: F401  which hands in the kernels
from sparse_compile.layout import lists
from sparse_compile.layout.builders import ByDevice


@contextmanager
def worklists_on_the_cpu(workers: int) -> Iterator[None]:
    """Lists on the CPU as kernels on a GPU get them; what is cached of others is not met."""
    forget = lists.static_lists.cache_clear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lists, "_WITH_WORKLISTS", ("cpu",))
        patch.setattr(lists, "workers_of", lambda device: workers)
        forget()
        yield
    forget()


def serve_the_cpu(builders: ByDevice[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what builds on a GPU build on the CPU, too."""
    monkeypatch.setitem(builders._given, "cpu", builders._given["cuda"])


def serve_nothing(builders: ByDevice[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch do everything, on any device."""
    for device_type in ("cpu", "cuda"):
        monkeypatch.setitem(builders._given, device_type, None)

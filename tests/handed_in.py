"""Kernels of a GPU for tensors on the CPU, where Triton interprets them; or kernels for none."""

from __future__ import annotations

from typing import Any

import pytest

import sparse_compile.ops  # noqa: F401  which hands in the kernels
from sparse_compile.layout.builders import ByDevice


def serve_the_cpu(builders: ByDevice[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what builds on a GPU build on the CPU, too."""
    monkeypatch.setitem(builders._given, "cpu", builders._given["cuda"])


def serve_nothing(builders: ByDevice[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch do everything, on any device."""
    for device_type in ("cpu", "cuda"):
        monkeypatch.setitem(builders._given, device_type, None)

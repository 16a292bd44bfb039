"""Every test of this folder needs a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparse_compile.ops  # noqa: F401  which hands in the kernels


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

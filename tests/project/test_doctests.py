"""Every example in a docstring is run."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pytest

import sparse_compile

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(sparse_compile.__path__, "sparse_compile.")
    if not module.name.endswith("__main__")
)


def has_examples(name: str) -> bool:
    found = importlib.util.find_spec(name)
    assert found is not None
    assert found.origin is not None
    return ">>>" in Path(found.origin).read_text()


WITH_EXAMPLES = [name for name in MODULES if has_examples(name)]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
    assert results.attempted > 0


def test_every_module_can_be_imported() -> None:
    for name in MODULES:
        importlib.import_module(name)


def test_there_are_examples() -> None:
    assert {
        "sparse_compile.spec.attention",
        "sparse_compile.reference",
        "sparse_compile.layout.build",
    } <= set(WITH_EXAMPLES)

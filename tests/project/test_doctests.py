"""Every example in a docstring is run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import sparse_compile

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(sparse_compile.__path__, "sparse_compile.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = [
        "sparse_compile.spec.attention",
        "sparse_compile.reference",
        "sparse_compile.layout.build",
    ]
    for name in names:
        assert any(test.examples for test in finder.find(importlib.import_module(name)))

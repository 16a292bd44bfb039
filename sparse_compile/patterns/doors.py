"""Doors: the one place where patterns reach layouts and selections.

Those import patterns and need torch, which patterns do not: they meet when a tensor is asked for.
Hence by string. The operators come first, since they bring the kernels of a GPU.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def layouts() -> ModuleType:
    """:mod:`sparse_compile.layout.of_pattern`."""
    importlib.import_module("sparse_compile.ops")
    return importlib.import_module("sparse_compile.layout.of_pattern")


def selections() -> ModuleType:
    """:mod:`sparse_compile.selection.selection`."""
    importlib.import_module("sparse_compile.ops")
    return importlib.import_module("sparse_compile.selection.selection")


def selecting() -> ModuleType:
    """:mod:`sparse_compile.selection.select`."""
    importlib.import_module("sparse_compile.ops")
    return importlib.import_module("sparse_compile.selection.select")

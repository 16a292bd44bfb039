"""Gluon is experimental: names that differ between the versions of Triton, in one place.

``tests/codegen/test_selected_source.py`` compiles what uses them.
"""

from __future__ import annotations

import functools


@functools.lru_cache(maxsize=1)
def barrier() -> str:
    """The barrier of all threads of a program: ``thread_barrier`` up to Triton 3.6."""
    from triton.experimental.gluon import language

    return "thread_barrier" if hasattr(language, "thread_barrier") else "barrier"


@functools.lru_cache(maxsize=1)
def async_load() -> str:
    """The copy from global to shared memory: another name since Triton 3.9."""
    from triton.experimental.gluon.language.nvidia.ampere import async_copy

    return "async_load" if hasattr(async_copy, "async_load") else "async_copy_global_to_shared"

"""Gluon is experimental: names that differ between the versions of Triton, in one place.

``tests/codegen/test_gluon_source.py`` and ``tests/codegen/test_selected_source.py`` compile what
uses them.
"""

from __future__ import annotations


def barrier() -> str:
    """The barrier of all threads of a program or a role: ``thread_barrier`` up to Triton 3.6."""
    from triton.experimental.gluon import language

    return "thread_barrier" if hasattr(language, "thread_barrier") else "barrier"


def async_load() -> str:
    """The copy from global to shared memory by threads: another name since Triton 3.9."""
    from triton.experimental.gluon.language.nvidia.ampere import async_copy

    return "async_load" if hasattr(async_copy, "async_load") else "async_copy_global_to_shared"


def tile_load() -> str:
    """The copy of a described tile to shared memory: another name since Triton 3.9."""
    from triton.experimental.gluon.language.nvidia.hopper import tma

    return "async_load" if hasattr(tma, "async_load") else "async_copy_global_to_shared"


def tile_store() -> str:
    """The copy of a described tile from shared memory: another name since Triton 3.9."""
    from triton.experimental.gluon.language.nvidia.hopper import tma

    return "async_store" if hasattr(tma, "async_store") else "async_copy_shared_to_global"

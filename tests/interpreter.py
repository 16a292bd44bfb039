"""Triton's interpreter for the tests that ask for it, in a process that compiles kernels as well.

``TRITON_INTERPRET`` is read once, when triton is imported, and then nothing compiles any more. Here
every ``triton.jit`` function, those of triton's own library included, is interpreted while the
fixture ``interpreted_kernels`` is in use, and is compiled before and after.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

#: A function that sees all of the language, as the interpreter asks what to put in its place.
_SEES_ALL = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


@contextmanager
def interpreting() -> Iterator[None]:
    """Within it launches of kernels are interpreted; their tensors may be on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", _launch)
        patch.setattr(JITFunction, "__call__", _called_by_a_kernel)
        yield


@functools.cache
def _interpreted(function: Any) -> interpreter.InterpretedFunction[Any]:
    return interpreter.InterpretedFunction(function)


def _launch(kernel: Any, *arguments: Any, **options: Any) -> None:
    """Run every program of a launch, one after the other."""
    # The interpreter puts back what it replaces in the modules that the kernel sees, not what it
    # replaces for the functions that the kernel calls: so all is replaced here, once.
    scope = interpreter._patch_lang(_SEES_ALL)
    try:
        _interpreted(kernel.fn).run(*arguments, **options)
    finally:
        scope.restore()


def _called_by_a_kernel(function: Any, *arguments: Any, **named: Any) -> Any:
    return _interpreted(function.fn).rewrite()(*arguments, **named)

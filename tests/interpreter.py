"""Triton's interpreter for the tests that ask for it, in a process that compiles kernels as well.

``TRITON_INTERPRET`` is read once, when triton is imported, and then nothing compiles any more. Here
every ``triton.jit`` function, those of triton's own library included, is interpreted while the
fixture ``interpreted_kernels`` is in use, and is compiled before and after.

The interpreter takes most of its time to describe types and shapes, again in each operation. Here
it does so once for each type and shape; what kernels compute is the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import triton.experimental.gluon.language  # noqa: F401  wraps what it finds: not what is replaced
import triton.language as tl
from triton.language.semantic import TritonSemantic
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
        patch.setattr(interpreter, "_get_np_dtype", _stored_as)
        patch.setattr(tl.block_type, "__init__", _describe_block)
        patch.setattr(tl.tensor, "__init__", _describe_tensor)
        if not interpreter.interpreter_builder.options.debug:
            # Without ``debug`` it repeats each operation in 64 bits, and then does not look.
            patch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", _do_nothing)
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


def _do_nothing(*_: Any) -> None:
    pass


_get_np_dtype = interpreter._get_np_dtype
_init_block = tl.block_type.__init__


def _stored_as(dtype: Any) -> Any:
    """The numpy type of the data of a type."""
    scalar = dtype.scalar
    return _stored_by_name("uint64" if scalar.is_ptr() else scalar.name)


@functools.cache
def _stored_by_name(scalar: str) -> Any:
    return _get_np_dtype(tl.dtype(scalar))


_blocks: dict[tuple[Any, ...], dict[str, Any]] = {}


def _describe_block(block: Any, element: Any, shape: Any) -> None:
    key = element.name, *(n.value if isinstance(n, tl.constexpr) else n for n in shape)
    known = _blocks.get(key)
    if known is None:
        _init_block(block, element, shape)
        _blocks[key] = {name: value for name, value in vars(block).items() if value is not element}
    else:
        vars(block).update(known, element_ty=element)


def _describe_tensor(tensor: Any, handle: Any, dtype: Any) -> None:
    tensor.handle, tensor.type, tensor.dtype = handle, dtype, dtype.scalar
    tensor.shape, tensor.numel = _shape_of(tuple(dtype.shape) if dtype.is_block() else ())


@functools.cache
def _shape_of(lengths: tuple[int, ...]) -> tuple[Any, Any]:
    return tl.tuple([tl.constexpr(n) for n in lengths]), tl.constexpr(math.prod(lengths))

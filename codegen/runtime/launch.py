"""Launch kernels by the names of their parameters, with little work on the host.

Triton finds out at every launch how to specialise each argument, which takes longer than some
kernels run. What it looks at is known (whether integers are 1, multiples of 16 or over 32 bits,
whether pointers are aligned, and types), so a launch whose arguments look the same as before takes
the kernel compiled then. Versions of Triton that may look at more are asked every time. Launches of
calls that are repeated do not come here: see :mod:`sparse_compile.codegen.repeated`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen.entry import Entry, Kernel, Kind

#: Versions whose rules are those of :func:`kind`; ``tests/project/test_fences.py`` compares them.
_KNOWN = ("3.6.", "3.7.", "3.8.", "3.9.")
_MOST = 1024
#: Dtypes of operands, as the names of modules spell them.
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class _Watcher(threading.local):
    """Who sees what this thread starts: something with ``started`` and ``did_more``, or nobody."""

    current: Any = None


watcher = _Watcher()


@contextmanager
def watching(by: Any) -> Iterator[None]:
    """Somebody sees what this thread starts."""
    watcher.current = by
    try:
        yield
    finally:
        watcher.current = None


class Refused(Exception):
    """A kernel cannot run here, as only its compilation or its first launch could tell."""


def current(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which ``device`` is the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


class Launcher:
    """A kernel of a loaded module.

    Args:
        kernel: of which it is one.
        entry: which.
    """

    def __init__(self, kernel: Kernel, entry: Entry) -> None:
        self.entry, self.function = entry, kernel.function(entry)
        self.first_tensor = next(
            place for place, p in enumerate(entry.parameters) if p.kind in (Kind.POINTER, Kind.LIST)
        )
        #: Where constants stand: a kernel is compiled for their values, not for their kinds.
        self.constants = [
            place for place, p in enumerate(entry.parameters) if p.kind is Kind.CONSTANT
        ]
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, ...], values: Mapping[str, Any]) -> None:
        """Launch it on the current device.

        Args:
            grid: programs along up to three dimensions.
            values: of the parameters by name, constants included; those of others are left out.
        """
        arguments = self.entry.ordered(values)
        compiled = self.launched(grid, arguments)
        if watcher.current is not None:
            watcher.current.started.append((compiled, (*grid, 1, 1)[:3], arguments))

    def launched(self, grid: tuple[int, ...], arguments: Sequence[Any]) -> Any:
        """Launch it with values in the order of the entry; what was compiled, if that is kept."""
        device = arguments[self.first_tensor].device
        if device.type != "cuda" or not _rules_known():
            self._first(grid, arguments)
            return None
        key = device, *self.compiled_for(arguments)
        known = self.compiled.get(key)
        if known is None:
            if len(self.compiled) >= _MOST:
                self.compiled.clear()
            known = self.compiled[key] = self._first(grid, arguments)
        else:
            known[(*grid, 1, 1)[:3]](*arguments)
        return known

    def compiled_for(self, arguments: Sequence[Any]) -> list[Any]:
        """All of some arguments that a kernel is compiled for: of constants the values."""
        constants = [arguments[place] for place in self.constants]
        return [*constants, *signature(arguments)]

    def _first(self, grid: tuple[int, ...], arguments: Sequence[Any]) -> Any:
        try:
            return self.function[grid](*arguments, **self.entry.options)
        except _compile_errors() as error:
            raise Refused(f"{self.entry.name}: {error}") from error


def launchers_of(kernel: Kernel) -> dict[str, Launcher]:
    """The kernels of a module, and of those beside it, by the labels of their entries; loaded."""
    modules = (kernel, *kernel.beside)
    return {entry.label: Launcher(module, entry) for module in modules for entry in module.entries}


def strides(**tensors: Tensor) -> dict[str, int]:
    """The strides of batch, heads and tokens of tensors, by the names of their parameters.

    >>> strides(q=torch.zeros(1, 2, 8, 4))
    {'q_stride_b': 64, 'q_stride_h': 32, 'q_stride_n': 4}
    """
    return {
        f"{name}_stride_{axis}": step
        for name, t in tensors.items()
        for axis, step in zip("bhn", t.stride(), strict=False)
    }


def table_values(name: str, table: Tensor) -> dict[str, Any]:
    """A tensor that is looked up in, its strides and its sizes, by the names of their parameters.

    >>> list(table_values("t0", torch.zeros(2, 3)))
    ['t0', 't0_stride0', 't0_stride1', 't0_size0', 't0_size1']
    """
    strides = {f"{name}_stride{axis}": step for axis, step in enumerate(table.stride())}
    return {name: table} | strides | {f"{name}_size{i}": n for i, n in enumerate(table.shape)}


def signature(arguments: Sequence[Any]) -> list[Any]:
    """The kinds of arguments; that of most integers without a call."""
    return [
        (0 if a % 16 else 16) if type(a) is int and 1 < a < 1 << 31 else kind(a) for a in arguments
    ]


def kind(argument: Any) -> Any:
    """All of an argument that Triton compiles for, or finer: equal kinds, equal kernels.

    >>> kind(1) == kind(17), kind(32) == kind(48), kind(3) == kind(5), kind(1 << 40) == kind(32)
    (False, True, True, False)
    """
    if type(argument) is int:
        if 1 < argument < 1 << 31:
            return 0 if argument % 16 else 16  # as in signature()
        wide = not -(1 << 31) <= argument < 1 << 31
        return 1 if argument == 1 else (argument % 16 == 0, wide, argument >= 1 << 63)
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if argument is None or isinstance(argument, (bool, float)):
        return type(argument)
    # A tensor descriptor.
    return type(argument), argument.base.dtype, tuple(argument.block_shape)


@functools.lru_cache(maxsize=1)
def _rules_known() -> bool:
    import triton

    return bool(triton.__version__.startswith(_KNOWN))


@functools.lru_cache(maxsize=1)
def _compile_errors() -> tuple[type[Exception], ...]:
    """What Triton raises where a kernel does not compile, or needs more than the device has."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return CompilationError, OutOfResources, PTXASError

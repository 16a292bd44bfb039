"""The kernels of a key, loaded once, and launched with little work on the host."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sparse_compile.codegen.runtime.generated import load_module
from sparse_compile.codegen.triton.layout.key import Key
from sparse_compile.codegen.triton.layout.lookups import (
    Lookup,
    lookups_of,
    read_by_kernel,
    tables_of,
)
from sparse_compile.codegen.triton.layout.source import module_name, module_source
from sparse_compile.expr import B, H


class Launcher:
    """A kernel that is compiled once for each device.

    No argument of it is specialised and none is a constant, so what the first launch compiled
    serves all others, and Triton need not look at their arguments again.
    """

    def __init__(self, kernel: Any, warps: int) -> None:
        self.kernel, self.warps = kernel, warps
        self.compiled: dict[int, Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], device: torch.device, arguments: tuple[Any, ...]
    ) -> None:
        """Launch it; ints among the arguments fit int32, and ``device`` is the current one."""
        number = device.index or 0
        known = self.compiled.get(number)
        if known is not None:
            known[grid](*arguments)
            return
        compiled = self.kernel[grid](*arguments, num_warps=self.warps)
        if device.type == "cuda" and hasattr(compiled, "run"):
            self.compiled[number] = compiled


class Kernels:
    """The kernels of a key, and what their arguments are made of.

    Attributes:
        list, fill: of rows and of columns.
        read: reads the tables; None where no lookup is read by a kernel.
        lookups: of the predicate.
        read_lookups: those that ``read`` bounds.
        read_tables: the tables that it reads.
        by_batch, by_head: whether the mask mentions ``b`` and ``h``.
        free_sizes: numbers of the sizes that are arguments.
    """

    def __init__(self, key: Key) -> None:
        module = load_module(module_name(key), module_source(key))
        # Spans are short and lines are many: one warp a line.
        self.list = Launcher(module.list_rows, 1), Launcher(module.list_cols, 1)
        self.fill = Launcher(module.fill_rows, 1), Launcher(module.fill_cols, 1)
        self.lookups = lookups_of(key)
        self.read_lookups: tuple[Lookup, ...] = tuple(read_by_kernel(key))
        self.read = Launcher(module.read_tables, 4) if self.read_lookups else None
        self.read_tables = tuple(tables_of(self.read_lookups))
        self.by_batch, self.by_head = key.mask.depends_on(B), key.mask.depends_on(H)
        self.free_sizes = tuple(i for i, value in enumerate(key.fixed) if value is None)


@functools.lru_cache(maxsize=256)
def kernels_of(key: Key) -> Kernels:
    """The kernels of a key; imports Triton."""
    return Kernels(key)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which ``device`` is the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)

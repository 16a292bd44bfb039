"""The kernels of a key, loaded once."""

from __future__ import annotations

import functools

from sparse_compile.codegen.runtime.launch import launchers_of
from sparse_compile.codegen.triton.layout.key import Key
from sparse_compile.codegen.triton.layout.lookups import (
    Lookup,
    lookups_of,
    read_by_kernel,
    tables_of,
)
from sparse_compile.codegen.triton.layout.source import module_of
from sparse_compile.expr import B, H


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
        found = launchers_of(module_of(key))
        self.list = found["list_rows"], found["list_cols"]
        self.fill = found["fill_rows"], found["fill_cols"]
        self.lookups = lookups_of(key)
        self.read_lookups: tuple[Lookup, ...] = tuple(read_by_kernel(key))
        self.read = found.get("read_tables")
        self.read_tables = tuple(tables_of(self.read_lookups))
        self.by_batch, self.by_head = key.mask.depends_on(B), key.mask.depends_on(H)
        self.free_sizes = tuple(i for i, value in enumerate(key.fixed) if value is None)


@functools.lru_cache(maxsize=256)
def kernels_of(key: Key) -> Kernels:
    """The kernels of a key; imports Triton."""
    return Kernels(key)

"""dense_tables: mask tensors that a lifted mask reads as tables of bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch import Tensor

from sparse_compile.expr import Bit, table_index
from sparse_compile.layout.from_dense import DenseRead, words_of
from sparse_compile.selection import Selection
from sparse_compile.sites.site import LiftedMask


def dense_reads(lifted: LiftedMask) -> tuple[DenseRead, ...]:
    """How the mask tensors are read."""
    first = lifted.n_lifted_tables - len(lifted.dense)
    return tuple(DenseRead(first + i, table.axes) for i, table in enumerate(lifted.dense))


def mask_data(
    lifted: LiftedMask, outputs: Sequence[Any], n_q: int, n_kv: int
) -> tuple[list[Tensor], list[int]]:
    """The tables, without those of an annotation, and the sizes that a program returned."""
    count = lifted.n_lifted_tables
    tables = list(outputs[:count])
    for read in dense_reads(lifted):
        tables[read.table] = words_of(tables[read.table], read, n_q, n_kv)
    return tables, [int(size) for size in outputs[count : count + lifted.mask.n_sizes]]


def selection_data(lifted: LiftedMask, outputs: Sequence[Any]) -> Selection | None:
    """The selection that a program returned, if it does."""
    if lifted.selection is None:
        return None
    index, count = outputs[-2:]
    return Selection(index, count, lifted.selection.unit_q, lifted.selection.unit_kv)


def shown_predicate(lifted: LiftedMask) -> sympy.Basic:
    """The predicate for people: mask tensors as symbols that are named in words."""
    predicate = lifted.mask.predicate
    for read, table in zip(dense_reads(lifted), lifted.dense, strict=True):
        several = f" (t{read.table})" if len(lifted.dense) > 1 else ""
        shown = sympy.Symbol(table.shown + several)
        bits = [at for at in predicate.atoms(Bit) if table_index(at.args[0]) == read.table]
        for bit in bits:
            conditions = {sympy.Ne(bit, 0): shown, sympy.Eq(bit, 0): sympy.Not(shown)}
            predicate = predicate.xreplace(conditions)
    return predicate

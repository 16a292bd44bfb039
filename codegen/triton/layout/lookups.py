"""Table lookups in kernels: parameters that carry their bounds, and code that reads them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from sparse_compile.codegen.entry import Entry, Line, lists, sizes
from sparse_compile.codegen.runtime.generated import fill
from sparse_compile.codegen.triton.layout import table_text
from sparse_compile.codegen.triton.layout.key import LONGEST, Key
from sparse_compile.codegen.triton.layout.printed import INT32_MAX, Code, printed, variable
from sparse_compile.codegen.triton.tile import power_of_two
from sparse_compile.expr import KV, B, Q, is_table, table_index
from sparse_compile.layout.canonical import canonical_in
from sparse_compile.layout.intervals import Span, greatest, least, point, span
from sparse_compile.layout.table_bounds import axis_of, magnitude_of
from sparse_compile.spec.view import Order


@dataclass(frozen=True)
class Lookup:
    """A table lookup of a predicate, and how its bounds reach a kernel.

    Attributes:
        name: what its parameters begin with.
        index: number of the table.
        exprs: index expressions.
        dtype: of the table.
    """

    name: str
    index: int
    exprs: tuple[sympy.Expr, ...]
    dtype: str

    @functools.cached_property
    def axes(self) -> tuple[sympy.Symbol | None, ...]:
        """What each index runs along; see :func:`axis_of`."""
        return tuple(map(axis_of, self.exprs))

    @functools.cached_property
    def kept(self) -> tuple[int, ...]:
        """The dimensions of its bounds that have more than one entry."""
        return tuple(d for d, axis in enumerate(self.axes) if axis is not None)

    @functools.cached_property
    def points(self) -> tuple[int, ...]:
        """The dimensions that are indexed by a point of ``b, h``."""
        return tuple(d for d, axis in enumerate(self.axes) if axis == B)

    @functools.cached_property
    def along(self) -> sympy.Symbol | None:
        """The one of ``q`` and ``kv`` that one index runs along, the others being points."""
        others = [axis for axis in self.axes if axis != B]
        return others[0] if len(others) == 1 else None

    @functools.cached_property
    def is_point(self) -> bool:
        """Whether every index is a point of ``b, h``."""
        return all(axis == B for axis in self.axes)

    @property
    def bounds_dtype(self) -> str:
        """The dtype of its bounds: those of a point are entries of the table."""
        return self.dtype if self.is_point or self.dtype == "int64" else "int32"

    @property
    def parameters(self) -> list[str]:
        """The parameters of a kernel that carry its bounds.

        The lower bounds, how far behind them the upper ones lie, and of each kept dimension its
        stride, and its length if it is indexed by a point of ``b, h``.
        """
        strides = [f"{self.name}_stride{d}" for d in self.kept]
        lengths = [f"{self.name}_size{d}" for d in self.points]
        return [self.name, f"{self.name}_half", *strides, *lengths]

    def span(self, args: Sequence[Span]) -> Span:
        """Its bounds where its index expressions have these spans."""
        terms: list[Any] = []
        for d in self.kept:
            axis = self.axes[d]
            if axis in (Q, KV):
                place = variable(f"{axis}_at", 0, INT32_MAX)
            else:
                last = variable(f"{self.name}_size{d}", 1, INT32_MAX) - 1
                place = greatest(least(args[d].lo, last), 0)
            stride = Code.named(f"{self.name}_stride{d}", 0, INT32_MAX)
            terms.append(_within("*", place, stride))
        zero: Any = Code.constant(0)
        offset = functools.reduce(functools.partial(_within, "+"), terms or [zero])
        upper = _within("+", offset, Code.named(f"{self.name}_half", 0, INT32_MAX))
        size = magnitude_of(getattr(torch, self.dtype))
        return Span(self._loaded(offset), self._loaded(upper), 1, size)

    def _loaded(self, offset: Any) -> Any:
        bits = {"bool": 1, "int32": 31, "int64": 63}[self.dtype]
        low, high = (0, 1) if self.dtype == "bool" else (-(1 << bits), (1 << bits) - 1)
        after = ").to(tl.int32)" if self.dtype == "bool" else ")"
        return Code((f"tl.load({self.name} + ", offset, after), low, high, self.dtype == "int64")


def _within(op: str, a: Any, b: Code) -> Code:
    """A number of entries of one tensor: fewer than 2^31, which the launcher checks."""
    operand = Code.constant(a) if isinstance(a, int) else a
    return Code((operand, f" {op} ", b), 0, INT32_MAX)


@functools.lru_cache(maxsize=256)
def lookups_of(key: Key) -> tuple[Lookup, ...]:
    """The distinct lookups of a predicate, in a stable order."""
    predicate = canonical_in(key.mask.predicate, key.q, key.kv)
    found = {node for node in sympy.preorder_traversal(predicate) if is_table(node)}
    ordered = sorted(found, key=lambda node: (table_index(node), str(node)))
    return tuple(
        Lookup(f"l{i}", table_index(node), tuple(node.args), key.mask.tables[table_index(node)])
        for i, node in enumerate(ordered)
    )


def read_by_kernel(lookups: Sequence[Lookup]) -> list[Lookup]:
    """Those of lookups whose bounds :func:`tables_source` makes."""
    return [lookup for lookup in lookups if lookup.along is not None]


def _tables(lookups: Sequence[Lookup]) -> Line:
    """The tables of lookups, each with its strides and its lengths."""
    found: Line = ()
    ranks = {(lookup.index, lookup.dtype): len(lookup.exprs) for lookup in lookups}
    for (index, dtype), rank in sorted(ranks.items()):
        shape = [f"t{index}_{what}{d}" for what in ("stride", "size") for d in range(rank)]
        found += lists(f"t{index}", dtype=dtype) + sizes(*shape)
    return found


def tables_entry(key: Key) -> Entry | None:
    """The kernel ``read_tables``; None if there is nothing to read."""
    lookups = read_by_kernel(lookups_of(key))
    results = [lists(o.name, dtype=o.bounds_dtype) + sizes(f"{o.name}_half") for o in lookups]
    lines = (sizes("n_q", "n_kv"), *results, _tables(lookups), sizes(*key.sizes))
    return Entry("read_tables", lines, {"num_warps": 4}) if lookups else None


def tables_source(key: Key, entry: Entry) -> str:
    """The kernel ``read_tables``, and a function for each lookup."""
    lookups = read_by_kernel(lookups_of(key))
    data = [*(parameter.name for parameter in _tables(lookups)), *key.sizes]
    calls: list[str] = []
    for which, lookup in enumerate(lookups):
        own = ", ".join([lookup.name, f"{lookup.name}_half", "n_q", "n_kv", *data])
        calls += [f"if which == {which}:", f"    read_{lookup.name}({own})"]
    readers = "".join(_reader(key, lookup, data) for lookup in lookups)
    return readers + entry.text(table_text.TABLES, CALLS=calls)


def _reader(key: Key, lookup: Lookup, data: Sequence[str]) -> str:
    axis = lookup.along
    assert axis is not None
    order, (at,) = key.order(axis.name), (d for d, a in enumerate(lookup.axes) if a == axis)
    others = [d for d in range(len(lookup.axes)) if d != at]
    table, padded = f"t{lookup.index}", power_of_two(order.block)
    wide, block = lookup.dtype == "int64", variable("block", 0, order.blocks(LONGEST))
    return fill(
        table_text.LOOKUP,
        NAME=lookup.name,
        HALF=f"{lookup.name}_half",
        PARAMETERS=", ".join(data),
        TEXT=f"{table}({', '.join(map(str, lookup.exprs))})",
        AXIS=axis.name,
        ROWS=" * ".join(f"{table}_size{d}" for d in others) or "1",
        ENTRIES=_entries(table, others),
        MOST="GREATEST" if wide else str(INT32_MAX),
        LEAST="LEAST" if wide else str(-INT32_MAX - 1),
        DTYPE="tl.int64" if wide else "tl.int32",
        STEP=str(min(key.span, max(1, 2048 // padded))),
        PADDED=str(padded),
        LAST=str(order.block - 1),
        STRIDE=f"{table}_stride{at}",
        BASE=printed({"base": order.base(block, variable("n", 1, LONGEST))}),
        OFFSET=printed({"offset": _offset(order)}),
        PLACE=printed({"place": _place(key, lookup, at)}),
    )


def _entries(table: str, others: Sequence[int]) -> list[str]:
    """Lines that find the row ``row`` of a table, the last of its other axes running fastest."""
    lines = [f"entries, rest = {table}, row.to(tl.int64)"]
    for d in reversed(others):
        lines.append(f"entries += rest % {table}_size{d} * {table}_stride{d}")
        lines.append(f"rest = rest // {table}_size{d}")
    return lines


def _offset(order: Order) -> Any:
    """Token number ``j`` of a block, counted from its first one."""
    j = variable("j", 0, order.block - 1)
    return sum(
        j // math.prod(order.box[k + 1 :]) % order.box[k] * stride
        for k, stride in enumerate(order.strides)
    )


def _place(key: Key, lookup: Lookup, at: int) -> Any:
    """Where in the table a token reads."""
    assert lookup.along is not None
    token = point(variable("token", 0, LONGEST), LONGEST)
    symbols = {lookup.along.name: token, **key.scalars()}
    # Over a run of one token an interval is the value itself.
    read = span(lookup.exprs[at], symbols).lo
    last = variable(f"t{lookup.index}_size{at}", 1, INT32_MAX) - 1
    return greatest(least(read, last), 0)

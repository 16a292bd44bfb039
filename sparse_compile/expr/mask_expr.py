"""MaskExpr: a mask as a predicate, with the run-time data it reads."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass

import sympy

from sparse_compile.expr.nodes import COORDINATES, N_KV, N_Q, is_table, renumbered, table_index
from sparse_compile.expr.text import from_text, to_text


@dataclass(frozen=True)
class MaskExpr:
    """Which (b, h, q, kv) may attend.

    Attributes:
        predicate: sympy Boolean over the coordinates ``b, h, q, kv``, the sizes ``n_q, n_kv,
            s0, s1, ...`` and the tables ``t0, t1, ...``.
        tables: dtype of each table, ``"bool"``, ``"int32"`` or ``"int64"``; its number of
            dimensions is the number of index expressions in its lookups.
        n_sizes: how many run-time integers ``s0, s1, ...`` it reads.

    >>> from sparse_compile.expr import KV, Q, MaskExpr
    >>> causal = MaskExpr(KV <= Q)
    >>> str(causal), causal.uses_table, MaskExpr.parse(causal.text) == causal
    ('kv <= q', False, True)
    """

    predicate: sympy.Basic
    tables: tuple[str, ...] = ()
    n_sizes: int = 0

    def __str__(self) -> str:
        return str(self.predicate)

    @property
    def uses_table(self) -> bool:
        """Whether the layout depends on tensor values, so must be built at run time."""
        return bool(self.tables)

    @functools.cached_property
    def text(self) -> str:
        """A stable one-line spelling; :meth:`parse` reads it back."""
        return "|".join([to_text(self.predicate), ",".join(self.tables), str(self.n_sizes)])

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> MaskExpr:
        """The mask that :attr:`text` spelled."""
        predicate, tables, n_sizes = text.split("|")
        dtypes = tuple(name for name in tables.split(",") if name)
        return MaskExpr(from_text(predicate), dtypes, int(n_sizes))

    def depends_on(self, coordinate: sympy.Symbol) -> bool:
        """Whether the predicate mentions ``coordinate`` (one of ``B, H, Q, KV``)."""
        return bool(self.predicate.has(coordinate))

    @functools.cached_property
    def lookups(self) -> tuple[sympy.Basic, ...]:
        """Every distinct table lookup, in a stable order."""
        found = {node for node in sympy.preorder_traversal(self.predicate) if is_table(node)}
        return tuple(sorted(found, key=lambda node: (table_index(node), str(node))))

    def trimmed(self, kept: Collection[int] = ()) -> tuple[MaskExpr, tuple[int, ...]]:
        """The same with only the tables that it reads, numbered anew, and which these were.

        Args:
            kept: further tables that stay.

        >>> from sparse_compile.expr import KV, table
        >>> mask, which = MaskExpr(table(1)(KV) > 0, ("int64", "int32")).trimmed()
        >>> str(mask), mask.tables, which
        ('t0(kv) > 0', ('int32',), (1,))
        """
        used = tuple(sorted({table_index(lookup) for lookup in self.lookups}.union(kept)))
        dtypes = tuple(self.tables[number] for number in used)
        numbers = {old: new for new, old in enumerate(used)}
        return MaskExpr(renumbered(self.predicate, numbers), dtypes, self.n_sizes), used

    def __post_init__(self) -> None:
        names = {f"s{i}" for i in range(self.n_sizes)}
        known = {*(symbol.name for symbol in (*COORDINATES, N_Q, N_KV)), *names}
        unknown = {symbol.name for symbol in self.predicate.free_symbols} - known
        if unknown:
            raise ValueError(f"MaskExpr: unknown symbols {sorted(unknown)} in {self.predicate}")
        missing = {table_index(node) for node in self.lookups} - set(range(len(self.tables)))
        if missing:
            raise ValueError(f"MaskExpr: no dtype given for tables {sorted(missing)}")

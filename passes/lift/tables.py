"""From lookups of run-time data to tables: outputs of a program that the kernels read.

Run-time data is read along queries or along keys. What is read along both at once is a dense
matrix: it may only say who attends to whom, and becomes a table of bits. Unless it says so of
blocks, as in ``layout[h, q // 64, kv // 64]``: that is a table as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy
from sympy.core.function import AppliedUndef
from torch.fx import GraphModule

from sparse_compile.expr import (
    COORDINATES,
    KV,
    Bit,
    FloorDiv,
    FloorMod,
    MaskExpr,
    Q,
    dense_bit,
    table,
)
from sparse_compile.passes.lift.emit import Emitter, coordinates_of, is_whole
from sparse_compile.passes.lift.kept import Kept, emit_kept
from sparse_compile.passes.lift.masks import Lengths
from sparse_compile.passes.lift.selected import Chosen, emit_selection
from sparse_compile.passes.lift.value import DIMS, is_data, reads_data
from sparse_compile.sites.site import DenseTable, LiftedMask

#: What a table holds ready-made. Sums stay in the predicate, so that their terms can be shared.
_NOT_LINEAR = (FloorDiv, FloorMod, sympy.Abs, sympy.Min, sympy.Max)


#: What selects keys: an index, or a threshold on scores.
Selects: TypeAlias = Chosen | Kept


@dataclass(frozen=True)
class Tabled:
    """A predicate over tables, and the expressions that the tables hold.

    Attributes:
        predicate: in terms of ``t0(...), t1(...), ...``.
        others: further conditions in the same terms.
        contents: for each table, its element, over the coordinates that it is indexed with; or over
            ``DIMS``, where it is data as it is.
        dense: the same for each of the tables of bits, which come last; the elements are Booleans.
    """

    predicate: sympy.Basic
    others: tuple[sympy.Basic, ...]
    contents: tuple[sympy.Basic, ...]
    dense: tuple[sympy.Basic, ...]


class Tabler:
    """Replaces the run-time parts of a predicate by tables, as large parts as possible."""

    def __init__(self, same_length: bool) -> None:
        self._same_length = same_length
        self._tables: dict[sympy.Basic, int] = {}
        self._dense: dict[sympy.Basic, sympy.Symbol] = {}

    def __call__(self, predicate: sympy.Basic, *others: sympy.Basic) -> Tabled:
        """The predicate over tables, and further conditions."""
        replaced = [self._replace(condition) for condition in (predicate, *others)]
        first = len(self._tables)
        bits = {
            symbol: dense_bit(first + number, [c.name for c in coordinates_of(element)])
            for number, (element, symbol) in enumerate(self._dense.items())
        }
        whole, *rest = (condition.xreplace(bits) for condition in replaced)
        return Tabled(whole, tuple(rest), tuple(self._tables), tuple(self._dense))

    def _replace(self, expr: sympy.Basic) -> sympy.Basic:
        if not reads_data(expr):
            return expr
        if isinstance(expr, (sympy.And, sympy.Or)):
            return expr.func(*self._gathered(expr))
        if isinstance(expr, sympy.core.relational.Relational):
            if _worth_a_table(expr):
                return sympy.Ne(self._table(expr), 0)
            if any(_both(at) and not _is_of_blocks(at) for at in expr.atoms(AppliedUndef)):
                return self._dense_condition(expr)
        if isinstance(expr, _NOT_LINEAR) and _worth_a_table(expr):
            return self._table(expr)
        if is_data(expr):
            return self._whole(expr) if _both(expr) else self._table(expr)
        return expr.func(*map(self._replace, expr.args))

    def _gathered(self, expr: sympy.Basic) -> list[sympy.Basic]:
        """The arguments of an And or Or replaced, those that one table can hold together."""
        rest: list[sympy.Basic] = []
        sides: dict[tuple[sympy.Symbol, ...], list[sympy.Basic]] = {}
        for arg in expr.args:
            if reads_data(arg) and _worth_a_table(arg):
                sides.setdefault(coordinates_of(arg), []).append(arg)
            else:
                rest.append(arg)
        replaced = [self._replace(arg) for arg in rest]
        return replaced + [sympy.Ne(self._table(expr.func(*group)), 0) for group in sides.values()]

    def _dense_condition(self, relation: sympy.Basic) -> sympy.Basic:
        """A condition on a table of bits; symbols stand for these until all are known."""
        if isinstance(relation, sympy.Eq) and relation.args[1] == 0 and is_data(relation.args[0]):
            # One table for a mask and its opposite.
            return sympy.Not(self._dense_condition(sympy.Ne(*relation.args)))
        name = f"bit{len(self._dense)}"
        bit = sympy.Symbol(name, integer=True, nonnegative=True)
        return sympy.Ne(self._dense.setdefault(relation, bit), 0)

    def _whole(self, lookup: sympy.Basic) -> sympy.Expr:
        """A lookup in data that becomes a table as it is."""
        own = lookup.func(*(DIMS[d] if at != 0 else at for d, at in enumerate(lookup.args)))
        return table(self._tables.setdefault(own, len(self._tables)))(*lookup.args)

    def _table(self, expr: sympy.Basic) -> sympy.Expr:
        number = self._tables.setdefault(self._along_keys(expr), len(self._tables))
        return table(number)(*coordinates_of(expr))

    def _along_keys(self, expr: sympy.Basic) -> sympy.Basic:
        """What is read by query as the same read by key, so that both sides share one table."""
        lookup = expr.args[0] if isinstance(expr, sympy.Ne) else expr
        plain = is_data(lookup) and is_whole(lookup, coordinates_of(expr))
        return expr.xreplace({Q: KV}) if plain or self._same_length else expr


def _worth_a_table(expr: sympy.Basic) -> bool:
    """Whether a condition is best read from a table of its own.

    Not if it reads queries and keys, nor if it compares a position with less data than positions:
    ``kv < length[b]`` says more than a table over b and kv would.
    """
    coordinates = coordinates_of(expr)
    lookups = expr.atoms(AppliedUndef)
    return not _both(expr) and any(coordinates_of(node) == coordinates for node in lookups)


def _is_of_blocks(lookup: sympy.Basic) -> bool:
    """Whether a lookup by query and key says the same of several neighbours of both."""
    alone = [at for at in lookup.args if {Q, KV} & at.free_symbols]
    return all(
        len({Q, KV} & at.free_symbols) == 1 and at.has(FloorDiv, FloorMod) and not reads_data(at)
        for at in alone
    )


def _both(expr: sympy.Basic) -> bool:
    return bool({Q, KV} <= expr.free_symbols)


def with_program(
    emitter: Emitter,
    tabled: Tabled,
    named: sympy.Basic,
    sizes: Sequence[sympy.Symbol],
    chosen: Selects | None,
) -> LiftedMask:
    """The mask with the program that computes tables, mask tensors and sizes, then lists.

    Args:
        emitter: for the program.
        tabled: what the tables hold.
        named: the predicate, over the tables and the named sizes.
        sizes: torch size symbols to output last.
        chosen: the selection, if there is one.

    Raises:
        Unliftable: when a size is not at hand.
    """
    tables = [emitter.table(element) for element in tabled.contents]
    dense = [emitter.mask(element) for element in tabled.dense]
    numbers = [emitter.size_node(symbol) for symbol in sizes]
    outputs = [node for node, _ in (*tables, *dense)] + numbers
    dtypes = tuple(str(dtype).removeprefix("torch.") for _, dtype in tables)
    if isinstance(chosen, Kept):
        parts = sympy.And.make_args(named)
        mask = MaskExpr(sympy.And(*(p for p in parts if not p.has(Bit))), dtypes, len(sizes))
        outputs += emit_kept(chosen, emitter, mask, [node for node, _ in tables], numbers)
    elif chosen is not None:
        outputs += emit_selection(chosen, emitter)
    leaves = emitter.finish(outputs)
    mask = MaskExpr(named, (*dtypes, *["int32"] * len(dense)), len(sizes))
    read = tuple(DenseTable(axes, _shown(axes, emitter.lengths)) for _, axes in dense)
    module = GraphModule(emitter.lifter.gm, emitter.graph)
    return LiftedMask(mask, program=module, leaves=leaves, dense=read)


def _shown(axes: Sequence[str], lengths: Lengths) -> str:
    """A mask tensor in words."""
    sizes = [lengths[c] if c.name in axes else sympy.S.One for c in COORDINATES]
    return f"tensor [{', '.join(map(str, sizes))}]"

"""From lookups of run-time data to tables: outputs of a program that the kernels read.

Run-time data is read along queries or along keys. What is read along both at once is a dense
matrix: it may only say who attends to whom, and becomes a table of bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy
from sympy.core.function import AppliedUndef
from torch.fx import GraphModule

from sparse_compile.expr import KV, B, Bit, FloorDiv, FloorMod, H, MaskExpr, Q, dense_bit, table
from sparse_compile.passes.lift.emit import Emitter
from sparse_compile.passes.lift.kept import Kept, emit_kept
from sparse_compile.passes.lift.lift import Lifter
from sparse_compile.passes.lift.selected import Chosen, emit_selection
from sparse_compile.passes.lift.value import is_data, reads_data

_ORDER = (B, H, Q, KV)
#: What a table holds ready-made. Sums stay in the predicate, so that their terms can be shared.
_NOT_LINEAR = (FloorDiv, FloorMod, sympy.Abs, sympy.Min, sympy.Max)


#: What selects keys: an index, or a threshold on scores.
Selects: TypeAlias = Chosen | Kept

#: An element over run-time data, and the coordinates that its table is indexed with.
Content: TypeAlias = tuple[sympy.Basic, tuple[sympy.Symbol, ...]]


@dataclass(frozen=True)
class Tabled:
    """A predicate over tables, and the expressions that the tables hold.

    Attributes:
        predicate: in terms of ``t0(...), t1(...), ...``.
        contents: for each table, its element and the coordinates that it is indexed with.
        dense: the same for each of the tables of bits, which come last; the elements are Booleans.
    """

    predicate: sympy.Basic
    contents: tuple[Content, ...]
    dense: tuple[Content, ...]


class Tabler:
    """Replaces the run-time parts of a predicate by tables, as large parts as possible."""

    def __init__(self, same_length: bool) -> None:
        self._same_length = same_length
        self._tables: dict[Content, int] = {}
        self._dense: dict[Content, sympy.Symbol] = {}

    def __call__(self, predicate: sympy.Basic) -> Tabled:
        """The predicate over tables."""
        replaced = self._replace(predicate)
        first = len(self._tables)
        bits = {
            symbol: dense_bit(first + number, [c.name for c in coordinates])
            for number, ((_, coordinates), symbol) in enumerate(self._dense.items())
        }
        return Tabled(replaced.xreplace(bits), tuple(self._tables), tuple(self._dense))

    def _replace(self, expr: sympy.Basic) -> sympy.Basic:
        if not reads_data(expr):
            return expr
        if isinstance(expr, (sympy.And, sympy.Or)):
            return expr.func(*self._gathered(expr))
        if isinstance(expr, sympy.core.relational.Relational):
            if _worth_a_table(expr):
                return sympy.Ne(self._table(expr), 0)
            if any(_both(lookup) for lookup in expr.atoms(AppliedUndef)):
                return self._dense_condition(expr)
        if isinstance(expr, _NOT_LINEAR) and _worth_a_table(expr):
            return self._table(expr)
        if is_data(expr):
            return self._table(expr)
        return expr.func(*map(self._replace, expr.args))

    def _gathered(self, expr: sympy.Basic) -> list[sympy.Basic]:
        """The arguments of an And or Or replaced, those that one table can hold together."""
        rest: list[sympy.Basic] = []
        sides: dict[tuple[sympy.Symbol, ...], list[sympy.Basic]] = {}
        for arg in expr.args:
            if reads_data(arg) and _worth_a_table(arg):
                sides.setdefault(_coordinates(arg), []).append(arg)
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
        return sympy.Ne(self._dense.setdefault((relation, _coordinates(relation)), bit), 0)

    def _table(self, expr: sympy.Basic) -> sympy.Expr:
        coordinates = _coordinates(expr)
        key = (expr, coordinates)
        shared = self._along_keys(expr, coordinates)
        if shared is not None:
            key = shared
        number = self._tables.setdefault(key, len(self._tables))
        return table(number)(*coordinates)

    def _along_keys(
        self, expr: sympy.Basic, coordinates: tuple[sympy.Symbol, ...]
    ) -> tuple[sympy.Basic, tuple[sympy.Symbol, ...]] | None:
        """What is read by query as the same read by key, so that both sides share one table."""
        if Q not in coordinates:
            return None
        lookup = expr.args[0] if isinstance(expr, sympy.Ne) else expr
        plain = is_data(lookup) and _is_permutation(lookup, coordinates)
        if not (plain or self._same_length):
            return None
        swap = {Q: KV}
        return expr.xreplace(swap), tuple(swap.get(c, c) for c in coordinates)


def _is_permutation(lookup: sympy.Basic, coordinates: tuple[sympy.Symbol, ...]) -> bool:
    """Whether a lookup is a tensor read at these coordinates, each once: then it is the table."""
    named = [arg for arg in lookup.args if arg != 0]
    return sorted(named, key=str) == sorted(coordinates, key=str)


def _coordinates(expr: sympy.Basic) -> tuple[sympy.Symbol, ...]:
    return tuple(c for c in _ORDER if c in expr.free_symbols)


def _worth_a_table(expr: sympy.Basic) -> bool:
    """Whether a condition is best read from a table of its own.

    Not if it reads queries and keys, nor if it compares a position with less data than positions:
    ``kv < length[b]`` says more than a table over b and kv would.
    """
    coordinates = _coordinates(expr)
    lookups = expr.atoms(AppliedUndef)
    return not _both(expr) and any(_coordinates(node) == coordinates for node in lookups)


def _both(expr: sympy.Basic) -> bool:
    return bool({Q, KV} <= expr.free_symbols)


@dataclass(frozen=True)
class Program:
    """The program that computes tables, mask tensors and sizes.

    Attributes:
        module: it.
        origins: for each of its placeholders, which placeholder of the traced graph it is, or
            ``-1 - i`` for the i-th of the extra sizes.
        dtypes: of the tables.
        dense: the axes of each mask tensor.
    """

    module: GraphModule
    origins: tuple[int, ...]
    dtypes: tuple[str, ...]
    dense: tuple[tuple[str, ...], ...]


def build_program(
    traced: GraphModule,
    lifter: Lifter,
    tabled: Tabled,
    sizes: Sequence[sympy.Symbol],
    lengths: Mapping[sympy.Symbol, sympy.Expr],
    extra: Sequence[sympy.Symbol],
    named: sympy.Basic,
    chosen: Selects | None = None,
) -> Program:
    """The program that computes tables, mask tensors and sizes, then the lists of a selection.

    Args:
        traced: the functional ATen graph of the slice.
        lifter: its lifted nodes.
        tabled: what the tables hold.
        sizes: torch size symbols to output last.
        lengths: number of batch entries, heads, queries and keys, in torch's size symbols.
        extra: torch size symbols that the program may take as further inputs.
        named: the predicate, over the tables and the named sizes.
        chosen: the selection, if there is one.

    Raises:
        Unliftable: when a size is not at hand.
    """
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    device = output.args[0][0].meta["val"].device
    emitter = Emitter(traced, lifter, lengths, extra, device)
    tables = [emitter.table(element, coordinates) for element, coordinates in tabled.contents]
    dense = [emitter.mask(element, coordinates) for element, coordinates in tabled.dense]
    outputs = [node for node, _ in (*tables, *dense)]
    outputs += [emitter.size_node(symbol) for symbol in sizes]
    dtypes = tuple(str(dtype).removeprefix("torch.") for _, dtype in tables)
    if isinstance(chosen, Kept):
        mask = MaskExpr(_without_bits(named), dtypes, len(sizes))
        given = [node for node, _ in tables], [emitter.size_node(symbol) for symbol in sizes]
        outputs += emit_kept(chosen, emitter, lengths, mask, *given)
    elif chosen is not None:
        outputs += emit_selection(chosen, emitter, lengths)
    origins = emitter.finish(outputs)
    axes = tuple(axes for _, axes in dense)
    return Program(GraphModule(traced, emitter.graph), origins, dtypes, axes)


def _without_bits(predicate: sympy.Basic) -> sympy.Basic:
    """The parts of a predicate that read no mask tensor."""
    return sympy.And(*(part for part in sympy.And.make_args(predicate) if not part.has(Bit)))

"""Writing expressions over run-time data as functional ATen nodes: the table program."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from sparse_compile.expr import COORDINATES, is_table, table_index
from sparse_compile.expr.fold import JOINS, NAMES, fold, joined
from sparse_compile.ops.looked_up import LOOKED_UP
from sparse_compile.passes.graph_edit import with_axes
from sparse_compile.passes.lift.lift import Lifter
from sparse_compile.passes.lift.slice import made_of
from sparse_compile.passes.lift.tabulated import Span, Tabulated
from sparse_compile.passes.lift.value import DIMS, Element, Lifted, Unliftable, Value, size_expr

aten = torch.ops.aten

#: Operators on tensors, and on numbers.
_OPERATORS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "+": (aten.add, operator.add),
    "*": (aten.mul, operator.mul),
    "//": (aten.floor_divide, operator.floordiv),
    "%": (aten.remainder, operator.mod),
    "min": (aten.minimum, torch.sym_min),
    "max": (aten.maximum, torch.sym_max),
    "and": (aten.bitwise_and, operator.and_),
    "or": (aten.bitwise_or, operator.or_),
}
_COMPARE = {
    "<": (aten.lt, ">"),
    "<=": (aten.le, ">="),
    ">": (aten.gt, "<"),
    ">=": (aten.ge, "<="),
    "==": (aten.eq, "=="),
    "!=": (aten.ne, "!="),
}
_MOVES = {
    "squeeze": aten.squeeze.dim,
    "permute": aten.permute.default,
    "unsqueeze": aten.unsqueeze.default,
}
_TABLE_DTYPES = (torch.bool, torch.int32, torch.int64)


def coordinates_of(expr: sympy.Basic) -> tuple[sympy.Symbol, ...]:
    """The coordinates that an expression reads, in order."""
    return tuple(c for c in COORDINATES if c in expr.free_symbols)


def is_whole(lookup: sympy.Basic, coordinates: Sequence[sympy.Symbol]) -> bool:
    """Whether a lookup is a tensor read at these coordinates, each once."""
    named = [arg for arg in lookup.args if arg != 0]
    return len(named) == len(coordinates) and set(named) == set(coordinates)


class Emitter:
    """Builds the graph of a table program.

    Attributes:
        graph: the program so far; all of its placeholders come first.
        lifter: of the traced graph that it computes a part of.
        lengths: number of batch entries, heads, queries and keys, in torch's size symbols.
        device: of the mask.
    """

    def __init__(
        self,
        lifter: Lifter,
        lengths: Mapping[sympy.Symbol, sympy.Expr],
        holders: Mapping[sympy.Symbol, Node],
    ) -> None:
        """Begin. ``holders``: further inputs of the captured graph, which hold these sizes."""
        self.graph, self.lifter, self.lengths = Graph(), lifter, lengths
        self._tables: dict[Tabulated, Node] = {}
        self.device: torch.device = lifter.outputs[0].meta["val"].device
        self._copies: dict[Node, Node] = {}
        self._sizes: dict[sympy.Expr, Node] = {}
        self._leaves: dict[Node, Node] = {}
        for number, (given, leaf) in enumerate(lifter.leaves.items()):
            copy = self.graph.placeholder(f"leaf{number}")
            self._copies[given], self._leaves[copy] = copy, leaf
            if isinstance(given.meta.get("val"), torch.SymInt):
                self._sizes.setdefault(size_expr(given), copy)
        others = {s: node for s, node in holders.items() if node not in self._leaves.values()}
        for number, (symbol, node) in enumerate(others.items()):
            copy = self.graph.placeholder(f"size{number}")
            self._leaves[copy] = node
            self._sizes.setdefault(symbol, copy)

    def finish(self, outputs: Sequence[Node]) -> tuple[Node, ...]:
        """Close the graph; what each placeholder that is left stands for."""
        self.graph.output(tuple(outputs))
        for node in reversed([n for n in self.graph.nodes if n.op != "output"]):
            if not node.users:
                self.graph.erase_node(node)
        return tuple(self._leaves[n] for n in self.graph.nodes if n.op == "placeholder")

    def copy(self, node: Node) -> Node:
        """The node of the traced graph, with all it needs, in the program."""
        needed = made_of(node, known=self._copies)
        for old in self.lifter.gm.graph.nodes:
            if old in needed and old not in self._copies:
                self._copies[old] = self.graph.node_copy(old, self._copies.__getitem__)
        return self._copies[node]

    def _is_plain(self, source: Node) -> bool:
        """Whether a node is an input that holds bools where the mask is."""
        value = source.meta["val"]
        here = value.dtype == torch.bool and value.device == self.device
        return source.op == "placeholder" and here

    def given(self, leaf: Node) -> Node:
        """A further input, which stands for a node of the captured graph."""
        first = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
        with self.graph.inserting_before(first):
            copy = self.graph.placeholder(f"given{len(self._leaves)}")
        self._leaves[copy] = leaf
        return copy

    def source(self, source: Node | Tabulated) -> Node:
        """What a lookup reads, in the program."""
        if isinstance(source, Node):
            return self.copy(source)
        if source not in self._tables:
            args = [
                self.element(arg.element, arg.dtype, source.axes)
                if isinstance(arg, Lifted)
                else arg
                for arg in source.args
            ]
            made = self.graph.call_function(source.op, tuple(args), dict(source.kwargs))
            self._tables[source] = made
        return self._tables[source]

    def element(self, element: Element, dtype: torch.dtype, axes: Sequence[Span]) -> Node:
        """A tensor along some axes with the given element, of which it has all."""
        writer = _Writer(self, sympy.S.Zero, axes)
        if isinstance(element, sympy.Basic):
            node = writer.tensor(fold(element, writer))
        else:
            *cases, (_, last) = element
            node = writer.number(last, dtype)
            for condition, value in reversed(cases):
                where = writer.tensor(fold(condition, writer))
                args = where, writer.number(value, dtype), node
                node = self.graph.call_function(aten.where.self, args)
        sizes = [self.size(axis.length) for axis in axes]
        return self.graph.call_function(aten.expand.default, (node, sizes))

    def with_axes(self, node: Node, axes: Sequence[str], wanted: Sequence[str]) -> Node:
        """A tensor of the program with the axes that are wanted, in their order."""

        def call(name: str, tensor: Node, arg: Any) -> Node:
            return self.graph.call_function(_MOVES[name], (tensor, arg))

        return with_axes(call, node, axes, wanted)

    def size_node(self, symbol: sympy.Symbol) -> Node:
        """The node that holds a torch size symbol."""
        if symbol not in self._sizes:
            raise Unliftable(f"the size {symbol} is not at hand where the mask is computed")
        return self._sizes[symbol]

    def size(self, expr: sympy.Expr) -> int | Node:
        """A size: an int, or a node that computes it."""
        if expr.is_Integer:
            return int(expr)
        if expr in self._sizes:
            return self._sizes[expr]
        if expr.is_Symbol:
            return self.size_node(expr)
        name = NAMES.get(type(expr))
        if name not in _OPERATORS:
            raise Unliftable(f"the size {expr}")
        _, plain = _OPERATORS[name]
        node, *rest = (self.size(arg) for arg in expr.args)
        for arg in rest:
            node = self.graph.call_function(plain, (node, arg))
        assert isinstance(node, Node)
        self._sizes[expr] = node
        return node

    def table(self, element: sympy.Basic) -> tuple[Node, torch.dtype]:
        """A tensor over its coordinates with the given element, contiguous and its own memory."""
        if is_table(element) and element.free_symbols and element.free_symbols <= set(DIMS):
            node, dtype = self._here(table_index(element))
        else:
            writer = _Writer(self, element)
            node = fold(element, writer)
            dtype = writer.dtypes[node]
        if dtype not in _TABLE_DTYPES:
            dtype = torch.int32 if dtype.itemsize < 4 and dtype != torch.uint16 else torch.int64
            node = self.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
        options: dict[str, Any] = {"memory_format": torch.contiguous_format}
        return self.graph.call_function(aten.clone.default, (node,), options), dtype

    def _here(self, number: int) -> tuple[Node, torch.dtype]:
        """Data where the mask is, and its dtype."""
        source = self.lifter.data[number]
        value = source if isinstance(source, Tabulated) else source.meta["val"]
        node = self.source(source)
        if value.device != self.device:
            options: dict[str, Any] = {"device": self.device}
            node = self.graph.call_function(aten._to_copy.default, (node,), options)
        return node, value.dtype

    def mask(self, element: sympy.Basic) -> tuple[Node, tuple[str, ...]]:
        """A bool tensor with the given element, and what its axes are.

        An input itself, not a view of it: where that is stable, it need not be read again.
        """
        coordinates = coordinates_of(element)
        lookup = element.args[0] if isinstance(element, sympy.Ne) else None
        if lookup is not None and is_table(lookup) and is_whole(lookup, coordinates):
            source = self.lifter.node_of(lookup)
            if source is not None and self._is_plain(source):
                return self.copy(source), tuple("" if at == 0 else at.name for at in lookup.args)
        node = fold(element, _Writer(self, element))
        return node, tuple(coordinate.name for coordinate in coordinates)


class _Writer:
    """The algebra whose values are nodes (or numbers) that broadcast over the coordinates."""

    def __init__(
        self, emitter: Emitter, element: sympy.Basic, axes: Sequence[Span] | None = None
    ) -> None:
        """Along ``axes``; unless given, those of the coordinates that the element reads."""
        if axes is None:
            lengths = emitter.lengths
            axes = [Span(at, sympy.S.Zero, lengths[at]) for at in coordinates_of(element)]
        self.emitter, self.axes = emitter, {axis.symbol: axis for axis in axes}
        self.coordinates = tuple(self.axes)
        #: A table that is one lookup, as in t(b, kv), is the tensor itself whatever the lengths.
        lookup = element.args[0] if isinstance(element, sympy.Ne) else element
        self.whole = lookup if is_table(lookup) else None
        self.dtypes: dict[Node, torch.dtype] = {}

    def _call(self, result: torch.dtype, op: Any, *args: Any, **kwargs: Any) -> Node:
        """A node whose tensor has the dtype ``result``."""
        node = self.emitter.graph.call_function(op, args, kwargs)
        self.dtypes[node] = result
        return node

    def _is_tensor(self, value: Any) -> bool:
        return isinstance(value, Node) and value in self.dtypes

    # Leaves -------------------------------------------------------------------------------------

    def integer(self, value: int) -> Any:
        return value

    def boolean(self, value: bool) -> Any:
        return value

    def symbol(self, name: str) -> Any:
        for coordinate, axis in self.axes.items():
            if coordinate.name == name:
                first, end = map(self.emitter.size, (axis.first, axis.first + axis.length))
                device = self.emitter.device
                node = self._call(torch.int64, aten.arange.start, first, end, device=device)
                return self._place(node, torch.int64, [coordinate])
        return self.emitter.size_node(
            next(symbol for symbol in self.emitter._sizes if str(symbol) == name)
        )

    def _place(self, node: Node, dtype: torch.dtype, exprs: Sequence[sympy.Expr]) -> Node:
        """A tensor that is read at coordinates, or at 0 along axes of size one, over the grid."""
        names = [coordinate.name for coordinate in self.coordinates]
        node = self.emitter.with_axes(node, list(map(str, exprs)), names)
        self.dtypes[node] = dtype
        return node

    def table(self, index: int, args: Sequence[Any], exprs: Sequence[sympy.Expr]) -> Any:
        source = self.emitter.lifter.data[index]
        if isinstance(source, Tabulated):
            dtype, device = source.dtype, source.device
            sizes = [axis.length for axis in source.axes]
        else:
            value = source.meta["val"]
            dtype, device = value.dtype, value.device
            sizes = [size_expr(size) for size in value.shape]
        node = self.emitter.source(source)
        self.dtypes[node] = dtype
        if device != self.emitter.device:
            options = {"device": self.emitter.device}
            node = self._call(dtype, aten._to_copy.default, node, **options)
        if self._is_plain(exprs, sizes):
            return self._place(node, dtype, exprs)
        indices = [self._index(arg, size) for arg, size in zip(args, sizes, strict=True)]
        trained = dtype.is_floating_point and isinstance(source, Node)  # or may be
        return self._call(dtype, LOOKED_UP if trained else aten.index.Tensor, node, indices)

    def _is_plain(self, exprs: Sequence[sympy.Expr], sizes: Sequence[sympy.Expr]) -> bool:
        named = [(expr, size) for expr, size in zip(exprs, sizes, strict=True) if size != 1]
        if len({expr for expr, _ in named}) != len(named):
            return False
        whole = self.whole is not None and tuple(self.whole.args) == tuple(exprs)
        return all(
            expr in self.axes
            and self.axes[expr].first == 0
            and (whole or size == self.axes[expr].length)
            for expr, size in named
        )

    def _index(self, arg: Any, size: sympy.Expr) -> Node:
        if not self._is_tensor(arg):
            # Of as many dimensions as others: some versions of PyTorch mistake a mixture.
            shape = [1] * len(self.coordinates)
            options = {"dtype": torch.int64, "device": self.emitter.device}
            return self._call(torch.int64, aten.full.default, shape, arg, **options)
        # As when a predicate is evaluated: reads past the end are of entries that do not matter.
        last = self.emitter.size(size - 1)
        return self._call(self.dtypes[arg], aten.clamp.default, arg, 0, last)

    # Arithmetic ---------------------------------------------------------------------------------

    def operation(self, name: str, args: Sequence[Any], expr: sympy.Basic) -> Any:
        if name in _COMPARE:
            return self._compare(name, *args)
        if name == "not":
            return self._call(torch.bool, aten.bitwise_not.default, *args)
        if name == "abs":
            return self._call(self.dtypes[args[0]], aten.abs.default, *args)
        if name == "where":
            condition, (yes, no) = args[0], map(self._tensor, args[1:])
            return self._call(self._joined(yes, no), aten.where.self, condition, yes, no)
        if name == "bit":
            shifted = self._binary(aten.bitwise_right_shift, operator.rshift, *args)
            return self._binary(aten.bitwise_and, operator.and_, shifted, 1)
        if name in ("min", "max"):  # These take no numbers.
            args = [self._tensor(arg) for arg in args]
        if name in JOINS:
            # Tensors first: operators take a number on the right.
            args = sorted(args, key=lambda arg: not self._is_tensor(arg))
        return joined(functools.partial(self._binary, *_OPERATORS[name]), name, args)

    def _binary(self, op: Any, plain: Callable[..., Any], a: Any, b: Any) -> Any:
        """An operator on two values; at least one is a tensor unless both are sizes."""
        if self._is_tensor(a) or self._is_tensor(b):
            a = self._tensor(a)
            return self._call(self._joined(a, b), self._overload(op, b), a, b)
        if isinstance(a, Node) or isinstance(b, Node):
            return self.emitter.graph.call_function(plain, (a, b))
        return plain(a, b)

    def _overload(self, op: Any, b: Any) -> Any:
        if not self._is_tensor(b):
            return op.Scalar
        return op.Tensor if "Tensor" in op.overloads() else op.default

    def _joined(self, a: Any, b: Any) -> torch.dtype:
        dtypes = [self.dtypes[x] for x in (a, b) if self._is_tensor(x)]
        return functools.reduce(torch.promote_types, dtypes)

    def tensor(self, value: Any) -> Node:
        """A value as a tensor; a Boolean one is not a number."""
        if isinstance(value, bool):
            options = {"dtype": torch.bool, "device": self.emitter.device}
            return self._call(torch.bool, aten.full.default, [], value, **options)
        return self._tensor(value)

    def number(self, value: Value, dtype: torch.dtype) -> Node:
        """A number, or what an expression gives, in a dtype."""
        if not isinstance(value, sympy.Basic):
            options = {"dtype": dtype, "device": self.emitter.device}
            return self._call(dtype, aten.full.default, [], value, **options)
        node = self._tensor(fold(value, self))
        if self.dtypes[node] != dtype:
            node = self._call(dtype, aten._to_copy.default, node, dtype=dtype)
        return node

    def _tensor(self, value: Any) -> Node:
        """A value as a tensor."""
        if isinstance(value, Node) and value in self.dtypes:
            return value
        options = {"dtype": torch.int64, "device": self.emitter.device}
        return self._call(torch.int64, aten.full.default, [], value, **options)

    def _compare(self, name: str, a: Any, b: Any) -> Node:
        function, mirrored = _COMPARE[name]
        if not self._is_tensor(a):
            return self._compare(mirrored, b, a)
        whether = isinstance(b, int) and b == 0 and name in ("==", "!=")
        if whether and self.dtypes[a] == torch.bool:
            return a if name == "!=" else self._call(torch.bool, aten.bitwise_not.default, a)
        return self._call(torch.bool, self._overload(function, b), a, b)

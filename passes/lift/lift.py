"""Abstract interpretation of a functional ATen graph: every tensor as a :class:`Lifted` value."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from sparse_compile.expr import table_index
from sparse_compile.passes.lift.bounds import Ranges
from sparse_compile.passes.lift.builders import BUILDERS
from sparse_compile.passes.lift.constants import recognise
from sparse_compile.passes.lift.partly import cast_partly, elementwise_partly
from sparse_compile.passes.lift.scalars import RULES, cast, elementwise
from sparse_compile.passes.lift.simplify import Simplifier
from sparse_compile.passes.lift.slice import call_name, made_of
from sparse_compile.passes.lift.tabulated import Tabulated, by_distance, elements_of
from sparse_compile.passes.lift.value import (
    ABSORBING,
    DIMS,
    Element,
    Lifted,
    Shape,
    Unliftable,
    align,
    reindexed,
    single,
    size_expr,
)
from sparse_compile.passes.lift.views import VIEWS, Handler, Step, cleaned

#: Constant tensors up to this many elements are computed while compiling, to recognise them.
_MOST_CONSTANT_ELEMENTS = 1 << 24
_LARGEST_EXPRESSION = 4000

_HANDLERS: dict[str, Handler] = {**VIEWS, **BUILDERS}
_CASTS = ("_to_copy", "convert_element_type")


class Lifter:
    """Lifts the nodes of one functional ATen graph that are asked for, each once.

    A node without a symbolic meaning (``cumsum`` of run-time data, a graph input) becomes a lookup
    of its own elements; :attr:`data` says which node a lookup reads. What arithmetic on floating
    data reads beside it (the shifted windows under a learned bias) is never lifted.
    """

    def __init__(self, gm: GraphModule, leaves: Sequence[Node]) -> None:
        """Lift ``gm``; its placeholders stand for ``leaves`` of the captured graph."""
        self.gm = gm
        self.leaves = dict(zip(gm.graph.find_nodes(op="placeholder"), leaves, strict=True))
        self.data: dict[int, Node | Tabulated] = {}
        #: Nodes that are read only where they follow from data, and which these are.
        self.sources: dict[Node, set[Node]] = {}
        self._opaque = opaque_nodes(gm)
        self._values: dict[Node, Any] = {}
        self._numbers: dict[Node, Any] = {}
        self._simplifiers: dict[Shape, Simplifier] = {}
        self._computed: dict[tuple[Any, str], Node] = {}

    @property
    def outputs(self) -> Sequence[Node]:
        """What the graph returns."""
        (output,) = self.gm.graph.find_nodes(op="output")
        nodes: Sequence[Node] = output.args[0]
        return nodes

    def node_of(self, lookup: sympy.Basic) -> Node | None:
        """The node that a lookup reads; None if it reads what was tabulated."""
        found = self.data[table_index(lookup)]
        return found if isinstance(found, Node) else None

    def nodes_of(self, lookups: Iterable[sympy.Basic]) -> set[Node]:
        """The nodes that lookups read."""
        return {node for lookup in lookups if (node := self.node_of(lookup)) is not None}

    def tensor(self, node: Node) -> Lifted:
        """The lifted value of a tensor node."""
        if node not in self._values:
            # What it reads comes first, in the order of the graph.
            needed = made_of(node, self._values, self._opaque)
            for found in self.gm.graph.nodes:
                if found in needed:
                    self._values[found] = self._lift(found)
        value = self._argument(node)
        assert isinstance(value, Lifted)
        return value

    def computed(self, op: torch._ops.OpOverload, *args: Any) -> Node:
        """A node of the graph that computes more."""
        made = self._computed.get((op, repr(args)))
        if made is None:
            values = map_arg(args, lambda node: node.meta["val"])
            (output,), mode = self.gm.graph.find_nodes(op="output"), values[0].fake_mode
            with self.gm.graph.inserting_before(output), mode, torch.no_grad():
                made = self._computed[op, repr(args)] = self.gm.graph.call_function(op, args)
                made.meta["val"] = op(*values)
        return made

    def simplifier(self, shape: Shape) -> Simplifier:
        """A simplifier for coordinates in ``shape``."""
        if shape not in self._simplifiers:
            last = {DIMS[d]: size - 1 for d, size in enumerate(shape)}
            self._simplifiers[shape] = Simplifier(Ranges(last))
        return self._simplifiers[shape]

    def _lift(self, node: Node) -> Any:
        """The value of a node; why not, if it has none."""
        value = node.meta.get("val")
        if isinstance(value, (list, tuple)):
            return None
        try:
            if not isinstance(value, torch.Tensor):
                return _size(value)
            shape = tuple(size_expr(size) for size in value.shape)
            if len(shape) > len(DIMS):
                raise Unliftable("it has too many dimensions")
            return self._lift_tensor(node, shape, value.dtype)
        except Unliftable as error:
            return error

    def _lift_tensor(self, node: Node, shape: Shape, dtype: torch.dtype) -> Any:
        if node.op == "placeholder" or node in self._opaque:
            return self._lookup(node, shape, dtype)
        name = call_name(node)
        if name.startswith("empty") or name == "new_empty":
            # Meaningless until written over; whoever reads it fails.
            raise Unliftable("it reads uninitialised memory")
        with contextlib.suppress(Unliftable):
            return self._checked(self._symbolic(node, name, shape, dtype))
        with contextlib.suppress(Unliftable):
            return self._partly(node, name, shape, dtype)
        with contextlib.suppress(Unliftable):
            return self._tabulated(node, name, shape, dtype)
        with contextlib.suppress(Unliftable):
            return self._constant(node, shape, dtype)
        return self._lookup(node, shape, dtype)

    def unfolded(self, lookup: sympy.Basic) -> Lifted | None:
        """What arithmetic on floating data makes, by distance; None if that is not all."""
        node = self.node_of(lookup)
        if node is None or node not in self._opaque:
            return None
        for needed in node.all_input_nodes:
            self.tensor(needed)
        value = node.meta["val"]
        shape = tuple(size_expr(size) for size in value.shape)
        try:
            return self._tabulated(node, call_name(node), shape, value.dtype)
        except Unliftable:
            return None

    def _checked(self, lifted: Lifted) -> Lifted:
        lifted = cleaned(lifted, self.simplifier(lifted.shape))
        parts = [part for case in lifted.cases for part in case if isinstance(part, sympy.Basic)]
        if sum(sympy.count_ops(part) for part in parts) > _LARGEST_EXPRESSION:
            raise Unliftable("its pattern has too many pieces")
        return lifted

    def _symbolic(self, node: Node, name: str, shape: Shape, dtype: torch.dtype) -> Lifted:
        if node.target is operator.getitem:
            return self._part(node, shape, dtype)
        op = node.target
        if not isinstance(op, torch._ops.OpOverload):
            raise Unliftable(f"{op} has no symbolic meaning")
        if name in _CASTS:
            tensor = self._argument(node.args[0])
            return Lifted(shape, dtype, cast(tensor, dtype))
        if name in _HANDLERS and not (name == "index" and op._overloadname != "Tensor"):
            step = Step(self._bound(node, op), shape, dtype, self.simplifier(shape), op)
            return _HANDLERS[name](step)
        if not _is_elementwise(op, name):
            raise Unliftable(f"{name} has no symbolic meaning")
        args = [self._argument(arg) for arg in node.args]
        aligned = [align(a, len(shape)) if isinstance(a, Lifted) else a for a in args]
        kwargs = {key: self._argument(value) for key, value in node.kwargs.items()}
        return Lifted(shape, dtype, elementwise(op, aligned, kwargs, dtype))

    def _bound(self, node: Node, op: Any) -> tuple[Any, ...]:
        """Arguments by position, with the defaults of the schema."""
        given = [self._argument(arg) for arg in node.args]
        for argument in op._schema.arguments[len(given) :]:
            if argument.kwarg_only:
                break
            value = node.kwargs.get(argument.name, argument.default_value)
            given.append(self._argument(value))
        return tuple(given)

    def _argument(self, arg: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return [self._argument(item) for item in arg]
        value = self._values[arg] if isinstance(arg, Node) else arg
        if isinstance(value, Unliftable):
            raise value
        return value

    def _part(self, node: Node, shape: Shape, dtype: torch.dtype) -> Lifted:
        """One result of split, chunk or unbind."""
        source, number = node.args
        assert isinstance(source, Node)
        name = call_name(source)
        indices: list[sympy.Expr] = list(DIMS[: len(shape)])
        if name == "unbind":
            tensor, dim = self._bound(source, source.target)
            indices.insert(dim % len(tensor.shape), sympy.Integer(number))
        elif name in ("split", "split_with_sizes"):
            tensor, _, dim = self._bound(source, source.target)
            parts = source.meta["val"][:number]
            before = sum((size_expr(part.shape[dim]) for part in parts), sympy.S.Zero)
            indices[dim % len(shape)] += before
        else:
            raise Unliftable(f"{name} has no symbolic meaning")
        return reindexed(tensor, shape, indices)

    def _partly(self, node: Node, name: str, shape: Shape, dtype: torch.dtype) -> Lifted:
        """A node whose element is known in some cases, and what it computes elsewhere."""
        if not dtype.is_floating_point or not isinstance(node.target, torch._ops.OpOverload):
            raise Unliftable(f"{name} has no symbolic meaning")
        args = [self._argument(arg) for arg in node.args]
        args = [align(arg, len(shape)) if isinstance(arg, Lifted) else arg for arg in args]
        kwargs = {key: self._argument(value) for key, value in node.kwargs.items()}
        indices = [DIMS[d] if size != 1 else sympy.S.Zero for d, size in enumerate(shape)]
        own = self._read(node, dtype, indices)
        assert not isinstance(own, sympy.Basic)
        if name in _CASTS:
            element = cast_partly(args[0], dtype, own)
        elif _is_elementwise(node.target, name):
            element = elementwise_partly(node.target, args, kwargs, dtype, own)
        else:
            raise Unliftable(f"{name} has no symbolic meaning")
        self.sources[node] = self.nodes_of(_lookups(args))
        return self._checked(Lifted(shape, dtype, element))

    def _tabulated(self, node: Node, name: str, shape: Shape, dtype: torch.dtype) -> Lifted:
        """A node that depends on the distance of two dimensions, as a lookup by distance."""
        op = node.target
        pointwise = isinstance(op, torch._ops.OpOverload) and _is_elementwise(op, name)
        if not (pointwise or name in _CASTS):
            raise Unliftable(f"{name} has no symbolic meaning")
        args = [self._argument(arg) for arg in node.args]
        args = [align(arg, len(shape)) if isinstance(arg, Lifted) else arg for arg in args]
        found = by_distance(elements_of(args), shape)
        if found is None or any(isinstance(arg, sympy.Basic) for arg in args):
            raise Unliftable("it is no function of a distance")
        moved = tuple(
            Lifted((), arg.dtype, found.moved(arg.element)) if isinstance(arg, Lifted) else arg
            for arg in args
        )
        assert isinstance(op, torch._ops.OpOverload)
        device = node.meta["val"].device
        table = Tabulated(op, moved, node.kwargs, found.axes, dtype, device)
        return Lifted(shape, dtype, self._read(table, dtype, found.indices))

    # Nodes without a symbolic meaning ------------------------------------------------------------

    def _constant(self, node: Node, shape: Shape, dtype: torch.dtype) -> Lifted:
        """A node that reads no run-time data, computed and recognised."""
        element = recognise(self._compute(node)) if all(n.is_Integer for n in shape) else None
        if element is None:
            raise Unliftable("it has no pattern")
        return self._checked(Lifted(shape, dtype, element))

    def _compute(self, node: Node) -> Any:
        if node in self._numbers:
            return self._numbers[node]
        value = node.meta.get("val")
        too_large = isinstance(value, torch.Tensor) and (
            not all(isinstance(size, int) for size in value.shape)
            or value.numel() > _MOST_CONSTANT_ELEMENTS
        )
        if node.op == "placeholder" or too_large or isinstance(value, torch.SymInt):
            raise Unliftable("it is only known at run time, or large")
        if node.op == "get_attr":
            result = getattr(self.gm, str(node.target))
        else:
            args, kwargs = map_arg((node.args, node.kwargs), self._compute)
            assert callable(node.target)
            result = node.target(*args, **kwargs)
        self._numbers[node] = result
        return result

    def _lookup(self, node: Node, shape: Shape, dtype: torch.dtype) -> Lifted:
        indices = [DIMS[d] if size != 1 else sympy.S.Zero for d, size in enumerate(shape)]
        return Lifted(shape, dtype, self._read(node, dtype, indices))

    def _read(
        self, source: Node | Tabulated, dtype: torch.dtype, indices: Sequence[sympy.Expr]
    ) -> Element:
        """The element that a lookup of data reads."""
        number = len(self.data)
        self.data[number] = source
        letter = "m" if dtype == torch.bool else "f" if dtype.is_floating_point else "i"
        value = sympy.Function(f"{letter}{number}", integer=True)(*indices)
        return sympy.Ne(value, 0) if dtype == torch.bool else single(value)


def _lookups(args: Iterable[Any]) -> set[sympy.Basic]:
    """The lookups of data in the values of arguments."""
    tensors = (arg for arg in args if isinstance(arg, Lifted) and arg.dtype != torch.bool)
    values = (value for tensor in tensors for _, value in tensor.cases)
    symbolic = (value for value in values if isinstance(value, sympy.Basic))
    return {at for value in symbolic for at in value.atoms(sympy.core.function.AppliedUndef)}


def _size(value: Any) -> sympy.Expr:
    if not isinstance(value, (int, torch.SymInt)):
        raise Unliftable(f"a value of type {type(value).__name__} takes part")
    return size_expr(value)


def opaque_nodes(gm: GraphModule) -> frozenset[Node]:
    """The nodes that compute with floating run-time data, whose results are known to be data too.

    Nothing symbolic is known of floating inputs, however their elements are moved.
    """
    data: set[Node] = set()
    opaque: set[Node] = set()
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        moved = _moves(node) and node.args[0] in data
        if not moved and node.op != "placeholder" and _computes_with(node, data):
            opaque.add(node)
        if value.is_floating_point() and (moved or node.op == "placeholder" or node in opaque):
            data.add(node)
    return frozenset(opaque)


def _moves(node: Node) -> bool:
    """Whether a node only moves the elements of its first argument."""
    name = call_name(node)
    if name in _CASTS:
        source = node.args[0]
        return isinstance(source, Node) and source.meta["val"].dtype == node.meta["val"].dtype
    return name in VIEWS and bool(node.args)


def _computes_with(node: Node, data: set[Node]) -> bool:
    """Whether a node applies an elementwise operator, or a conversion, to some of ``data``."""
    name = call_name(node)
    if not isinstance(node.target, torch._ops.OpOverload) or name in _HANDLERS:
        return False
    others = [source for source in node.all_input_nodes if source not in data]
    if name == "add" and len(others) == 1:
        mask = made_of(others[0])  # perhaps
        if not any(map(_of_windows, mask)) or any(map(_absorbs, mask)):
            return False
    if name not in _CASTS and not _is_elementwise(node.target, name):
        return False
    return any(source in data for source in node.all_input_nodes)


def _of_windows(node: Node) -> bool:
    """Whether a tensor has more axes than scores: as masks of windows, which take long to read."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() > 4


def _absorbs(node: Node) -> bool:
    """Whether a node reads a number that hides what it is added to: a bias that is none."""
    return any(isinstance(arg, float) and arg <= ABSORBING for arg in node.args)


def _is_elementwise(op: torch._ops.OpOverload, name: str) -> bool:
    return name in RULES or torch.Tag.pointwise in op.tags

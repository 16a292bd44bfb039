"""Values to compute masks with while compiling: those of the example, and made up ones."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from sparse_compile.passes.graph_edit import example_value
from sparse_compile.passes.lift.kept import arguments_of, is_topk_index, topk_dim, topk_of
from sparse_compile.passes.lift.value import size_expr
from sparse_compile.sites.operands import Scope


@dataclass(frozen=True)
class Examples:
    """Concrete values for a captured graph's inputs and sizes.

    Attributes:
        values: of the outermost graph's placeholders: tensors, or ints.
        symbols: of torch's size symbols.
    """

    values: Mapping[Node, Any]
    symbols: Mapping[sympy.Symbol, int]

    @staticmethod
    def of(scope: Scope, example_inputs: Sequence[Any]) -> Examples:
        """From what Dynamo passes to a backend."""
        while scope.parent is not None:
            scope = scope.parent
        holders = [node for node in scope.gm.graph.nodes if node.op == "placeholder"]
        values = dict(zip(holders, example_inputs, strict=True))
        symbols: dict[sympy.Symbol, int] = {}
        for node, value in values.items():
            symbols.update(_symbols(node.meta.get("example_value"), value))
        for node, value in values.items():
            if isinstance(value, torch.SymInt):
                values[node] = int(size_expr(value).xreplace(symbols))
        return Examples(values, symbols)

    def value_of(self, leaf: Node) -> Any:
        """The value of an input, or of a constant of a graph; None if it is not known."""
        if leaf.op == "get_attr":
            return operator.attrgetter(str(leaf.target))(leaf.graph.owning_module)
        return self.values.get(leaf)

    def size(self, size: Any) -> int:
        """The example value of a size."""
        expr = size if isinstance(size, sympy.Basic) else size_expr(size)
        return int(expr.xreplace(self.symbols))

    def knows(self, size: Any) -> bool:
        """Whether the example says what a size is."""
        return bool(size_expr(size).free_symbols <= set(self.symbols))


def _symbols(fake: Any, value: Any) -> Iterator[tuple[sympy.Symbol, int]]:
    if isinstance(fake, torch.SymInt):
        symbol = fake.node.expr
        # Integer inputs come as SymInts too; what they were in this call is their hint.
        number = value if isinstance(value, int) else value.node.hint
        if symbol.is_Symbol and number is not None:
            yield symbol, int(number)
    elif isinstance(fake, Tensor) and isinstance(value, Tensor):
        for size, number in zip(fake.shape, value.shape, strict=True):
            yield from _symbols(size, int(number))


def example_of(leaf: Node, examples: Examples) -> Any:
    """The example value of a leaf; made up for results of operations that are not run here."""
    known = examples.value_of(leaf)
    if known is not None:
        return known
    fake = leaf.meta["example_value"]
    if not isinstance(fake, Tensor):
        return examples.size(fake) if examples.knows(fake) else 1
    shape = [examples.size(size) for size in fake.shape]
    if fake.dtype.is_floating_point:
        return torch.randn(shape, device=fake.device).to(fake.dtype)
    if is_topk_index(leaf):
        return _topk(leaf, shape, examples)
    return torch.randint(0, 2, shape, device=fake.device).to(fake.dtype)


def _topk(leaf: Node, shape: Sequence[int], examples: Examples) -> Tensor:
    """Indices as a top-k gives them: distinct, and all that there may be occur."""
    source, dim = topk_of(leaf), topk_dim(leaf)
    assert source is not None
    given = arguments_of(source)["input"]
    full = [examples.size(size) for size in example_value(given).shape]
    device = leaf.meta["example_value"].device
    return torch.rand(full, device=device).topk(shape[dim], dim).indices


def draws(leaves: Iterable[Any]) -> list[Callable[[Any], Any]]:
    """Ways to make other inputs. On a GPU only values that occurred: an index out of range there
    would end the process."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        return []
    generator = torch.Generator().manual_seed(0)
    small = all(leaf.device.type == "cpu" for leaf in tensors)

    def shuffled(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.numel() == 0:
            return leaf
        if leaf.dtype == torch.bool:
            return torch.randint(0, 2, leaf.shape, generator=generator).bool().to(leaf.device)
        order = torch.randint(0, leaf.numel(), leaf.shape, generator=generator)
        return leaf.detach().reshape(-1)[order.to(leaf.device)]

    def little(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dtype.is_floating_point or leaf.dtype.is_complex:
            return shuffled(leaf)
        high = 2 if leaf.dtype == torch.bool else 3
        return torch.randint(0, high, leaf.shape, generator=generator).to(leaf.dtype)

    return [shuffled, little, little] if small else [shuffled, shuffled]

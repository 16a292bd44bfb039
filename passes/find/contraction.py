"""Products of two tensors as index letters: matmul, bmm and einsum are one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from sparse_compile.passes.find import values
from sparse_compile.passes.find.canonical import Call, canonical
from sparse_compile.sites.operands import Operand

Letters = tuple[str, ...]


@dataclass(frozen=True)
class Contraction:
    """``node[out] = sum over the other letters of left[...] * right[...]``.

    An axis of size one broadcasts, as in matmul. For ``baddbmm`` it is the product alone.

    Attributes:
        node: the product.
        left, right: the factors, one letter per axis.
        out: the letters of the product.
    """

    node: Node
    left: Operand
    right: Operand
    out: Letters

    @property
    def summed(self) -> frozenset[str]:
        """The letters that are contracted."""
        return frozenset(self.left.axes + self.right.axes) - frozenset(self.out)


def contraction(node: Node) -> Contraction | None:
    """The node as a contraction of two tensors, None if it is not one."""
    call = canonical(node)
    if call is None:
        return None
    if call.op == "matmul":
        return _product(node, call.args["input"], call.args["other"])
    if call.op == "baddbmm":
        return _product(node, call.args["batch1"], call.args["batch2"])
    return _einsum(node, call) if call.op == "einsum" else None


def _product(node: Node, left: Any, right: Any) -> Contraction | None:
    if values.tensor(left) is None or values.tensor(right) is None:
        return None
    ranks = len(values.shape(left)), len(values.shape(right))
    if min(ranks) < 2:
        return None
    batch = tuple(f"batch{i}" for i in range(max(ranks) - 2))
    lead = [batch[len(batch) - (rank - 2) :] for rank in ranks]
    factors = Operand(left, (*lead[0], "i", "j")), Operand(right, (*lead[1], "j", "k"))
    return Contraction(node, *factors, (*batch, "i", "k"))


def _einsum(node: Node, call: Call) -> Contraction | None:
    operands = call.args["operands"]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if len(operands) != 2 or any(values.tensor(operand) is None for operand in operands):
        return None
    ranks = [len(values.shape(operand)) for operand in operands]
    parsed = parse_einsum(call.args["equation"], ranks)
    if parsed is None:
        return None
    left, right, out = parsed
    return Contraction(node, Operand(operands[0], left), Operand(operands[1], right), out)


def parse_einsum(equation: object, ranks: list[int]) -> tuple[Letters, Letters, Letters] | None:
    """The letters of both operands and of the result; None for what attention never needs.

    >>> parse_einsum("... q d, ...kd -> ...qk", [3, 3])
    (('.0', 'q', 'd'), ('.0', 'k', 'd'), ('.0', 'q', 'k'))
    """
    if not isinstance(equation, str) or "->" not in equation:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    hidden = [
        rank - len(term.replace("...", "")) if "..." in term else 0
        for term, rank in zip(terms, ranks, strict=True)
    ]
    left, right = (_letters(term, count) for term, count in zip(terms, hidden, strict=True))
    out = _letters(output, max(hidden))
    sides = (left, right, out)
    if any(len(set(side)) != len(side) for side in sides) or not set(out) <= set(left + right):
        return None
    if len(left) != ranks[0] or len(right) != ranks[1]:
        return None
    return sides


def _letters(term: str, hidden: int) -> Letters:
    before, dots, after = term.partition("...")
    # Ellipsis axes align from the right, so they are numbered from the right.
    middle = tuple(f".{i}" for i in reversed(range(hidden))) if dots else ()
    return (*before, *middle, *after)

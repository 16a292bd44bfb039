"""A mask operand as a condition: which scores it keeps, and what the others become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch

from sparse_compile.passes.lift.masks import COORDINATES
from sparse_compile.passes.lift.value import DIMS, Lifted, Refused, reads_data
from sparse_compile.sites.site import MaskOperand


@dataclass(frozen=True)
class Keep:
    """What one operand does to the scores.

    Attributes:
        condition: which scores stay as they are, over ``b, h, q, kv``.
        fills: what masked scores get, without repetition.
        adds: whether a fill is added to the score (else it takes its place).
    """

    condition: sympy.Basic
    fills: tuple[float, ...]
    adds: bool


def read_operand(
    operand: MaskOperand, tensor: Lifted, fill: Lifted | None, axes: Sequence[str]
) -> Keep:
    """The meaning of an operand.

    Args:
        operand: the operand.
        tensor: its lifted value.
        fill: the lifted value of its fill, where that is a node.
        axes: the axes of the scores.

    Raises:
        Refused: when it is a bias rather than a mask.
    """
    if operand.role == "add":
        return _added(tensor, axes)
    if tensor.dtype != torch.bool:
        raise Refused("the condition of its masked_fill or where is not a bool tensor")
    condition = at_coordinates(tensor.condition, tensor, axes)
    keep = condition if operand.role == "keep" else sympy.Not(condition)
    return Keep(keep, (_fill_value(operand, fill),), adds=False)


def _fill_value(operand: MaskOperand, fill: Lifted | None) -> float:
    if fill is None:
        assert not isinstance(operand.fill, torch.fx.Node)
        return float(operand.fill)
    values = [value for _, value in fill.cases]
    if fill.is_float_data or len(values) != 1 or isinstance(values[0], sympy.Basic):
        raise Refused(
            "the score it gives to masked entries is only known at run time",
            "write the fill value as a constant, such as float('-inf')",
        )
    return float(values[0])


def _added(tensor: Lifted, axes: Sequence[str]) -> Keep:
    if tensor.is_float_data:
        raise Refused(
            "it adds a bias that is not a mask: its values are only known at run time",
            "pass a bool mask if it only says who may attend to whom, or promise what it is: "
            "sparse_compile.mask(module, pattern, promise=True)",
        )
    if tensor.dtype == torch.bool:
        raise Refused(
            "it adds a bool mask to the scores, which adds 1 where it is True and masks nothing",
            "use torch.where or masked_fill with float('-inf')",
        )
    kept: list[sympy.Basic] = []
    fills: list[float] = []
    for condition, value in tensor.cases:
        if isinstance(value, sympy.Basic) and reads_data(value):
            raise Refused(
                "it adds a bias that is not provably a mask: it is computed from integers that "
                "need not be 0 and 1",
                "turn them into bool first, as in torch.where(mask.bool(), 0.0, float('-inf'))",
            )
        if isinstance(value, sympy.Basic) or not value <= 0:
            raise Refused(f"it adds a bias that is not a mask: it takes the value {value}")
        if value == 0:
            kept.append(condition)
        else:
            fills.append(float(value))
    return Keep(at_coordinates(sympy.Or(*kept), tensor, axes), tuple(fills), adds=True)


def at_coordinates(condition: sympy.Basic, tensor: Lifted, axes: Sequence[str]) -> sympy.Basic:
    """A condition over ``DIMS`` of a mask that broadcasts against scores with the given axes."""
    rank = len(tensor.shape)
    if rank > len(axes):
        extra = rank - len(axes)
        if any(size != 1 for size in tensor.shape[:extra]):
            raise Refused("the mask has more dimensions than the scores")
    names = [""] * (rank - len(axes)) + list(axes)[max(0, len(axes) - rank) :]
    values = {DIMS[d]: COORDINATES.get(name, sympy.S.Zero) for d, name in enumerate(names)}
    return condition.xreplace(values)

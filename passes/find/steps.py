"""What a program does to the scores, step by step, and what it amounts to: a scale and masks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from sparse_compile.passes.find import values
from sparse_compile.passes.find.constants import constant
from sparse_compile.passes.find.dataflow import Dataflow
from sparse_compile.passes.find.refusal import Refusal
from sparse_compile.sites.site import MaskOperand


@dataclass(frozen=True)
class Factor:
    """The scores were multiplied with a number, or divided by it."""

    value: Any
    inverse: bool = False


@dataclass(frozen=True)
class Masked:
    """A mask was applied to scores of this shape. ``fill`` is still the program's argument."""

    node: Node
    role: str
    fill: Any
    shape: tuple[Any, ...]


@dataclass(frozen=True)
class Narrowed:
    """The scores were rounded to a dtype with less range or precision."""

    dtype: torch.dtype


Step = Factor | Masked | Narrowed


def fold(steps: tuple[Step, ...], flow: Dataflow) -> tuple[float | Node, tuple[MaskOperand, ...]]:
    """The scale of the product, and the masks on the scaled scores.

    Raises:
        Refusal: they cannot be told apart.
    """
    factor, runtime, masks = 1.0, None, list[MaskOperand]()
    for step in steps:
        if isinstance(step, Masked):
            masks.append(MaskOperand(step.node, step.role, _filled(step.fill)))
        elif isinstance(step, Narrowed):
            _check_survives(masks, step.dtype)
        elif (known := constant(step.value, flow)) is not None:
            known = _invert(known) if step.inverse else known
            factor *= known
            masks = [_scaled(mask, known) for mask in masks]
        else:
            if runtime is not None or step.inverse or masks:
                raise Refusal(
                    "the scores are scaled by a number known only at run time, and not just "
                    "multiplied once before the masks",
                    "multiply q by it instead",
                )
            runtime = _runtime(step.value)
    if runtime is not None and factor != 1.0:
        raise Refusal(
            f"the scores are scaled by {factor:g} and by a number known only at run time",
            "multiply q by one of them instead",
        )
    return factor if runtime is None else runtime, tuple(masks)


def _runtime(value: Node) -> Node:
    example = values.tensor(value)
    if example is not None and example.requires_grad:
        raise Refusal("the scale of the scores is a trained parameter", "multiply q by it instead")
    return value


def _filled(fill: object) -> float | Node:
    return fill if isinstance(fill, Node) else float(fill)  # type: ignore[arg-type]


def _invert(value: float) -> float:
    if value == 0.0:
        raise Refusal("the scores are divided by zero")
    return 1.0 / value


def _scaled(mask: MaskOperand, factor: float) -> MaskOperand:
    if factor == 1.0 or (mask.fill == -math.inf and mask.role != "add" and factor > 0):
        return mask
    if mask.role == "add" or isinstance(mask.fill, Node) or factor <= 0:
        raise Refusal("the scores are masked before they are scaled", "scale them first")
    return replace(mask, fill=mask.fill * factor)


def _check_survives(masks: list[MaskOperand], dtype: torch.dtype) -> None:
    if any(mask.role == "add" or mask.fill != -math.inf for mask in masks):
        raise Refusal(
            f"masked scores are rounded to {values.short_dtype(dtype)}, which changes the "
            "masked value",
            "mask with -inf, or after the cast",
        )

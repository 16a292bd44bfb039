"""What a program does to the scores, step by step: a scale, a score program and masks."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from sparse_compile.expr import SCORE, ScoreProgram
from sparse_compile.expr.score import number
from sparse_compile.passes.find import values
from sparse_compile.passes.find.dataflow import Dataflow, constant
from sparse_compile.sites.site import MaskOperand, Refused


@dataclass(frozen=True)
class Factor:
    """The scores were multiplied with a number, or divided by it."""

    value: Any
    inverse: bool = False


@dataclass(frozen=True)
class Masked:
    """A mask was applied to scores of this shape."""

    mask: MaskOperand
    shape: tuple[Any, ...]


@dataclass(frozen=True)
class Narrowed:
    """The scores were rounded to a dtype with less range or precision."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Tanh:
    """The hyperbolic tangent of the scores took their place."""


Step = Factor | Masked | Narrowed | Tanh


def fold(
    steps: tuple[Step, ...], flow: Dataflow
) -> tuple[float | Node, tuple[MaskOperand, ...], ScoreProgram | None]:
    """The scale of the product, the masks on the scores, and what happens to it before them.

    Raises:
        Refused: they cannot be told apart.
    """
    curves = [at for at, step in enumerate(steps) if isinstance(step, Tanh)]
    if not curves:
        return *_linear(steps, flow), None
    if any(isinstance(step, Masked) for step in steps[: curves[-1]]):
        raise Refused(
            "the scores are masked before the tanh, which makes the masked value finite: masked "
            "keys keep some weight",
            "apply the mask after the softcap",
        )
    first, *_ = cut = [steps[a:b] for a, b in itertools.pairwise([0, *curves, len(steps)])]
    (scale, _), (cap, masks) = _linear(first, flow), _linear(cut[1][1:], flow)
    value = SCORE
    if not isinstance(scale, Node) and not isinstance(cap, Node) and cap:
        # scale / cap, tanh, cap: the scale is that of the product, whatever the order.
        scale, value = scale * cap, SCORE / number(cap)
    for steps_after in cut[1:]:
        factor, masks = _linear(steps_after[1:], flow)
        if isinstance(factor, Node):
            raise Refused(
                "the softcapped scores are scaled by a number known only at run time",
                "write the cap as a Python number",
            )
        if factor == 0.0:
            raise Refused("the softcapped scores are multiplied by zero")
        value = number(factor) * sympy.tanh(value)
    return scale, masks, ScoreProgram(value)


def _linear(
    steps: tuple[Step, ...], flow: Dataflow
) -> tuple[float | Node, tuple[MaskOperand, ...]]:
    """The scale of scores, and the masks on the scaled scores, of steps without a curve."""
    factor, runtime, masks = 1.0, None, list[MaskOperand]()
    for step in steps:
        if isinstance(step, Masked):
            masks.append(step.mask)
        elif isinstance(step, Narrowed):
            _check_survives(masks, step.dtype)
        elif isinstance(step, Factor):
            if (known := constant(step.value, flow)) is not None:
                known = _invert(known) if step.inverse else known
                factor *= known
                masks = [_scaled(mask, known) for mask in masks]
                continue
            if runtime is not None or step.inverse or masks:
                raise Refused(
                    "the scores are scaled by a number known only at run time, and not just "
                    "multiplied once before the masks",
                    "multiply q by it instead",
                )
            runtime = _runtime(step.value)
    if runtime is not None and factor != 1.0:
        raise Refused(
            f"the scores are scaled by {factor:g} and by a number known only at run time",
            "multiply q by one of them instead",
        )
    return factor if runtime is None else runtime, tuple(masks)


def _runtime(value: Node) -> Node:
    example = values.tensor(value)
    if example is not None and example.requires_grad:
        raise Refused("the scale of the scores is a trained parameter", "multiply q by it instead")
    return value


def _invert(value: float) -> float:
    if value == 0.0:
        raise Refused("the scores are divided by zero")
    return 1.0 / value


def _scaled(mask: MaskOperand, factor: float) -> MaskOperand:
    if factor == 1.0 or (mask.fill == -math.inf and mask.role != "add" and factor > 0):
        return mask
    if mask.role == "add" or isinstance(mask.fill, Node) or factor <= 0:
        raise Refused("the scores are masked before they are scaled", "scale them first")
    return replace(mask, fill=mask.fill * factor)


def _check_survives(masks: list[MaskOperand], dtype: torch.dtype) -> None:
    if any(mask.role == "add" or mask.fill != -math.inf for mask in masks):
        raise Refused(
            f"masked scores are rounded to {values.short_dtype(dtype)}, which changes the "
            "masked value",
            "mask with -inf, or after the cast",
        )

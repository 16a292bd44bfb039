"""What a program does to the scores, step by step: a scale, a score program, masks and biases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from sparse_compile.expr import SCORE, ScoreProgram, learned
from sparse_compile.expr.score import number, softcap
from sparse_compile.passes.find import values
from sparse_compile.passes.find.dataflow import Dataflow, constant
from sparse_compile.sites.operands import Change, MaskOperand
from sparse_compile.sites.site import Refused


@dataclass(frozen=True)
class Factor:
    """The scores were multiplied with a number, or divided by it."""

    value: Any
    inverse: bool = False


@dataclass(frozen=True)
class Masked:
    """A mask or a bias was applied to scores of this shape; with ``times`` -1 it is subtracted."""

    mask: MaskOperand
    shape: tuple[Any, ...]
    times: float = 1.0
    inverse: bool = False


@dataclass(frozen=True)
class Shift:
    """A number was added to all scores."""

    value: float


@dataclass(frozen=True)
class OwnMaximum:
    """The maximum of each row was subtracted from it, which softmax alone would ignore."""


@dataclass(frozen=True)
class Narrowed:
    """The scores were rounded to a dtype with less range or precision."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Floored:
    """Scores below the least finite number of their dtype were raised to it: -inf, that is.

    Attributes:
        least: that number.
        shares: as of a :class:`Change`.
    """

    least: float
    shares: bool


@dataclass(frozen=True)
class Curve:
    """A function of the scores took their place."""

    name: str
    function: Callable[[sympy.Expr], sympy.Expr]


Step = Factor | Masked | Shift | OwnMaximum | Narrowed | Floored | Curve


def _sigmoid(x: sympy.Expr) -> sympy.Expr:
    return 1 / (1 + sympy.exp(-x))


#: Functions of one number, by the names of the operators.
CURVES: dict[str, Callable[[sympy.Expr], sympy.Expr]] = {
    "tanh": sympy.tanh,
    "exp": sympy.exp,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "relu": lambda x: sympy.Max(x, 0),
    "abs": sympy.Abs,
    "square": lambda x: x**2,
}


#: The axes of scores of some shape.
Axes = Callable[[tuple[Any, ...]], tuple[str, ...]]


def fold(
    steps: tuple[Step, ...], flow: Dataflow, axes: Axes, sunk: bool
) -> tuple[float | Node, tuple[MaskOperand, ...], ScoreProgram | None]:
    """The scale of the product, the operands of the scores, and what happens to these before masks.

    Args:
        steps: in the order in which the program applies them.
        flow: the graph.
        axes: of scores of some shape.
        sunk: whether there are columns beside the scores then.

    Raises:
        Refused: they cannot be told apart.
    """
    folding = _Folding(flow, axes)
    for at, step in enumerate(steps):
        if isinstance(step, Shift):
            # Softmax ignores it, unless something else than a mask follows.
            plain = all(isinstance(later, (Narrowed, Floored)) for later in steps[at:][1:])
            folding.value += 0 if plain and not sunk else number(step.value)
        elif isinstance(step, OwnMaximum):
            _check_ignored(steps[at:][1:], sunk)
            if not all(isinstance(later, (Shift, OwnMaximum)) for later in steps[at:][1:]):
                folding.centred()
        else:
            _FOLDS[type(step)](folding, step)
    program = None if folding.value == SCORE else ScoreProgram(folding.value)
    return folding.scale, tuple(folding.masks), program


def _check_ignored(later: tuple[Step, ...], sunk: bool) -> None:
    """That what was subtracted from all scores of a row is the same in the end."""
    curved = any(isinstance(step, Curve) for step in later)
    factors = any(isinstance(step, Masked) and step.mask.role == "factor" for step in later)
    if sunk or curved or factors:
        raise Refused(
            "the maximum of the scores is subtracted before something that it matters for",
            "leave it out: softmax ignores it",
        )


class _Folding:
    """The steps so far, as one scale, operands, and an expression over both."""

    def __init__(self, flow: Dataflow, axes: Axes) -> None:
        self.flow, self.axes = flow, axes
        self.scale: float | Node = 1.0
        self.value: sympy.Expr = SCORE
        self.masks: list[MaskOperand] = []
        #: Where the value is ``cap * tanh(score / cap)``, whatever the order of its factors.
        self.cap: float | None = None

    def factor(self, step: Factor) -> None:
        """Numbers that nothing but masks comes before are part of the scale."""
        known = constant(step.value, self.flow)
        if known is None:
            return self._run_time(step)
        times = _invert(known) if step.inverse else known
        self._change(Change(times=times), times)
        if self.value == SCORE:
            self._scale_by(times)
        elif times == 0.0:
            raise Refused("the scores are multiplied by zero after a curve, or a sum")
        elif self.cap is not None and isinstance(self.scale, float):
            self.cap *= times
            self.scale *= times
            self.value = softcap(self.cap).value
        else:
            self.value, self.cap = number(times) * self.value, None
        return None

    def _scale_by(self, times: float) -> None:
        if not isinstance(self.scale, Node):
            self.scale *= times
        elif times == 0.0:
            raise Refused("the scores are multiplied by zero")
        elif times != 1.0:
            self.value = number(times) * self.value

    def _run_time(self, step: Factor) -> None:
        if self.value != SCORE or step.inverse or self.masks or isinstance(self.scale, Node):
            raise Refused(
                "the scores are scaled by a number known only at run time, and not just "
                "multiplied once before the masks",
                "multiply q by it instead",
            )
        scaled, self.scale = self.scale, _runtime(step.value)
        self._scale_by(scaled)

    def _change(self, change: Change, times: float = 1.0) -> None:
        """What is done to the scores after they were masked."""
        if change == Change():
            return
        if times <= 0 and self.masks:
            raise Refused("the scores are masked before they are scaled", "scale them first")
        self.masks = [replace(mask, then=(*mask.then, change)) for mask in self.masks]

    def narrowed(self, step: Narrowed) -> None:
        """Masked scores are rounded; that of others is a matter of precision."""
        self._change(Change(rounded=step.dtype))

    def floored(self, step: Floored) -> None:
        """What masks with -inf masks with a finite number then."""
        self._change(Change(least=step.least, shares=step.shares))

    def centred(self) -> None:
        """Rows that are masked as a whole are 0 then, or NaN."""
        self._change(Change(centred=True))

    def masked(self, step: Masked) -> None:
        """An operand; what it adds, or multiplies with, has a name in the program."""
        mark = learned(len(self.masks))()
        mask = replace(step.mask, axes=self.axes(step.shape), sizes=step.shape)
        self.cap = self.cap if mask.role in ("keep", "drop") else None
        if mask.role == "add":
            mask = replace(mask, times=step.times)
            self.value += mark if step.times == 1.0 else number(step.times) * mark
        elif mask.role == "factor":
            if any(one.role != "factor" for one in self.masks):
                raise Refused(
                    "the scores are multiplied by a tensor after something was added to them, or "
                    "they were masked",
                    "multiply q by it instead",
                )
            self.value = self.value / mark if step.inverse else self.value * mark
        self.masks.append(mask)

    def curve(self, step: Curve) -> None:
        """A function of all scores, of which none may be masked."""
        if any(mask.role in ("keep", "drop") for mask in self.masks):
            raise Refused(
                f"the scores are masked before the {step.name}, which makes the masked value "
                "finite: masked keys keep some weight",
                "apply the mask after the softcap",
            )
        self.masks = [replace(mask, curved=True) for mask in self.masks]
        self.cap = 1.0 if self.value == SCORE and step.name == "tanh" else None
        self.value = step.function(self.value)


_FOLDS: dict[type, Callable[[_Folding, Any], None]] = {
    Factor: _Folding.factor,
    Masked: _Folding.masked,
    Narrowed: _Folding.narrowed,
    Floored: _Folding.floored,
    Curve: _Folding.curve,
}


def _runtime(value: Node) -> Node:
    example = values.tensor(value)
    if example is not None and example.requires_grad:
        raise Refused("the scale of the scores is a trained parameter", "multiply q by it instead")
    return value


def _invert(value: float) -> float:
    if value == 0.0:
        raise Refused("the scores are divided by zero")
    return 1.0 / value

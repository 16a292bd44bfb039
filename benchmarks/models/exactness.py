"""The outputs and gradients of a model, and whether those of a compiled one are as exact."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.models.entry import Inputs

#: Relative, in fp32.
BAR = 1e-5
#: What is above the bar may be this much further from fp64 than eager is.
_WORSE = 1.1
#: Further from fp64 than this, eager computes something else there: nothing is learnt from it.
_ROUNDING = 1e-3
#: A gradient that is this small in fp64 beside the largest is zero but for rounding, as that of a
#: key bias is.
_NOTHING = 1e-9
_OUTPUT = "output "


@dataclass(frozen=True)
class Exactness:
    """How a compiled model compares with eager.

    Attributes:
        output: the largest relative error of an output.
        gradient: of a parameter's gradient; None: not compared.
        worst: the tensor that has the largest of all.
        within: whether each is within the bar, or as near to fp64 as eager is.
    """

    output: float
    gradient: float | None
    worst: str
    within: bool


def values(
    call: Callable[..., Any], model: nn.Module, inputs: Inputs, training: bool
) -> dict[str, Tensor]:
    """The outputs of a call and, under a fixed loss of all of them, every parameter's gradient."""
    model.zero_grad(set_to_none=True)
    outputs = [x for x in tree_leaves(_plain(call(**inputs))) if _is_real(x)]
    found = {f"{_OUTPUT}{number}": output.detach() for number, output in enumerate(outputs)}
    if not training:
        return found
    generator = torch.Generator().manual_seed(7)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    terms = [(x * draw(x.shape).to(x.dtype)).sum() for x in outputs]
    torch.stack(terms).sum().backward()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name] = torch.zeros_like(parameter) if grad is None else grad.clone()
    return found


def exactness(
    ours: dict[str, Tensor], model: nn.Module, inputs: Inputs, training: bool
) -> Exactness:
    """Compare with eager, and where that is above the bar with eager in fp64."""
    eager = values(model, model, inputs, training)
    errors = {name: relative_error(ours[name], eager[name]) for name in eager}
    beyond = [name for name, error in errors.items() if error > BAR]
    if beyond:
        truth = _in_double(model, inputs, training)
        size = max(value.nan_to_num().norm().item() for value in truth.values())
        errors |= {n: 0.0 for n in beyond if is_nothing(ours[n], truth[n], size)}
        beyond = [n for n in beyond if errors[n] and not is_as_exact(ours[n], eager[n], truth[n])]
    outputs = [error for name, error in errors.items() if name.startswith(_OUTPUT)]
    gradients = [error for name, error in errors.items() if not name.startswith(_OUTPUT)]
    worst = max(errors, key=lambda name: errors[name])
    return Exactness(max(outputs), max(gradients, default=None), worst, not beyond)


def is_nothing(ours: Tensor, truth: Tensor, size: float) -> bool:
    """Whether a gradient is zero but for rounding, beside others of norm up to ``size``."""
    return truth.norm().item() <= _NOTHING * size and ours.norm().item() <= BAR * size


def is_as_exact(ours: Tensor, eager: Tensor, truth: Tensor) -> bool:
    """Whether a value in fp32 is as near to that in fp64 as eager's is."""
    error, eagers = relative_error(ours, truth), relative_error(eager, truth)
    return error <= BAR or (eagers <= _ROUNDING and error <= _WORSE * eagers)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """``|value - truth| / |truth|``; infinite where one is NaN or infinite and the other is not."""
    value, truth = value.double(), truth.double()
    if not torch.equal(value.isfinite(), truth.isfinite()):
        return math.inf
    value, truth = (x.nan_to_num(0.0, 0.0, 0.0) for x in (value, truth))
    return (value - truth).norm().item() / (truth.norm().item() or 1.0)


def _in_double(model: nn.Module, inputs: Inputs, training: bool) -> dict[str, Tensor]:
    exact = copy.deepcopy(model).double()
    doubled = {name: x.double() if _is_real(x) else x for name, x in inputs.items()}
    with in_double():
        return values(exact, exact, doubled, training)


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """What a program makes or asks for in fp32 is fp64."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InDouble():
            yield
    finally:
        torch.set_default_dtype(usual)


class _InDouble(TorchFunctionMode):
    """What a program asks for in fp32 (norms, softmax, rotations), it gets in fp64."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = Tensor.double if func is Tensor.float else func
        wide = tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return func(*wide[0], **wide[1])


def _plain(output: Any) -> Any:
    """The outputs of models as tuples: pytrees do not know all of their classes."""
    return tuple(map(_plain, output.to_tuple())) if hasattr(output, "to_tuple") else output


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()

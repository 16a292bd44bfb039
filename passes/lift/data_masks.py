"""Masks that a module keeps in a buffer of floating numbers: 0 and -100, say, or 0 and -inf.

What they hold only a call knows, and it may change. So both readings are said at once: what is as
low as a mask hides, and all else is a bias. Where a row holds nothing else, its softmax is even
over the highest of the numbers, which differ by more than any score; NaN if that is -inf.
"""

from __future__ import annotations

import math

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from sparse_compile.passes.lift.lift import Lifter
from sparse_compile.passes.lift.masks import Keep, SiteMasks, at_coordinates
from sparse_compile.passes.lift.value import ABSORBING
from sparse_compile.sites.operands import Change
from sparse_compile.sites.site import Refused

aten = torch.ops.aten


def is_kept(leaf: Node) -> bool:
    """Whether an input of a graph is what a module keeps, or a constant."""
    return leaf.op == "get_attr" or "_buffers_" in str(leaf.target)


def with_hidden(masks: SiteMasks, lifter: Lifter, mark: int, keep: Keep) -> Keep:
    """An operand of which only a call knows the numbers, as a mask and a bias.

    Args:
        masks: of the attention.
        lifter: of what computes them.
        mark: the number of the operand.
        keep: what it does if nothing in it is a mask.

    Raises:
        Refused: what is done to the scores later may leave a masked one some weight.
    """
    operand, dtype = masks.site.masks[mark], masks.dtype_at(mark)
    moved = any(change != Change(times=change.times) for change in operand.then)
    changed = operand.role != "add" or operand.curved or operand.times != 1.0 or moved
    if changed or keep.hidden or dtype == torch.float16:
        raise Refused(
            "it adds a bias that may be a mask: its values are only known at run time, and may be "
            "as low as a mask's",
            "keep a bool mask in the buffer, and use torch.where or masked_fill",
        )
    given, places = lifter.outputs[mark], masks.places(operand)
    low = lifter.computed(aten.le.Scalar, given, ABSORBING)
    best = lifter.computed(aten.amax.default, given, [-1], True)
    finite = lifter.computed(aten.gt.Scalar, given, -math.inf)
    equal = lifter.computed(aten.eq.Tensor, given, best)
    top = lifter.computed(aten.bitwise_and.Tensor, equal, finite)
    top = lifter.computed(aten.bitwise_and.Tensor, top, low)
    is_low, is_top = (
        at_coordinates(found.condition, found, places)
        for found in (lifter.tensor(node) for node in (low, top))
    )
    below = sympy.And(is_low, sympy.Not(is_top))
    hidden = (is_top, torch.finfo(dtype).min), (below, -math.inf)
    fills = tuple(operand.changed(fill) for _, fill in hidden)
    return Keep(sympy.Not(is_low), fills, hidden, keep.bias, data=True)


def hides(tensor: Tensor, fill: float | None = None) -> Tensor:
    """Where a tensor of such numbers hides; only those that count as ``fill``, if it is given."""
    low = tensor <= ABSORBING
    if fill is None:
        return low
    top = low & (tensor == tensor.amax(-1, keepdim=True)) & (tensor > -math.inf)
    return top if fill > -math.inf else low & ~top

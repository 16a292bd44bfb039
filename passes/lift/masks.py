"""What an attention asks of lifting: its masks, what computes them, and what they do to scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from sparse_compile.expr import KV, B, FloorDiv, FloorMod, H, Q
from sparse_compile.ops.pattern import on_axes
from sparse_compile.passes.graph_edit import dimension, example_value, first_reader
from sparse_compile.passes.lift.slice import Slice, Slicer, Wanted
from sparse_compile.passes.lift.value import (
    ABSORBING,
    DIMS,
    Cases,
    Lifted,
    Number,
    Value,
    merged,
    size_expr,
)
from sparse_compile.passes.mutation import Memory
from sparse_compile.sites.operands import MaskOperand
from sparse_compile.sites.site import AttentionSite, Refused

Lengths = Mapping[sympy.Symbol, sympy.Expr]

#: The indices of scores, one for each of their axes.
Places = tuple[sympy.Expr, ...]

#: The coordinates of scores, by the names of their axes.
COORDINATES = {"b": B, "h": H, "q": Q, "kv": KV}

#: As low as this, the least float16 leaves no weight whatever it is scaled by.
_LOW_HALF = -1e4


@dataclass(frozen=True)
class SiteMasks:
    """The masks of an attention; equal ones are made by the same nodes.

    Attributes:
        site: the attention.
        wanted: the masks, then the fills that are nodes, each with the first node that reads it.
        part: the slice that computes these.
        lengths: number of batch entries, heads, queries and keys, in torch's size symbols.
        memory: which tensors of its graph share memory.
    """

    site: AttentionSite
    wanted: tuple[Wanted, ...]
    part: Slice
    lengths: Lengths
    memory: Memory

    @staticmethod
    def of(site: AttentionSite, slicer: Slicer) -> SiteMasks:
        """The masks of a site that has some.

        Raises:
            Refused: their computation cannot be cut out.
        """
        nodes = [mask.node for mask in site.masks]
        nodes += [mask.fill for mask in site.masks if isinstance(mask.fill, Node)]
        wanted = tuple(Wanted(node, first_reader(site, node)) for node in nodes)
        memory = slicer.graph(site.scope).memory
        return SiteMasks(site, wanted, slicer(wanted, site.scope), _lengths(site), memory)

    def traced(self) -> SiteMasks:
        """The same after tracing, which may have fixed a size.

        As when a slice is compared with the length that it is cut from.
        """
        return replace(self, lengths=_lengths(self.site))

    @property
    def dtype(self) -> torch.dtype:
        """Of the scores when they are masked."""
        return self.dtype_at(0)

    def dtype_at(self, number: int) -> torch.dtype:
        """Of the scores when an operand is applied to them."""
        value = self._scores_at(number)
        if self.site.kind == "eager" and value is not None and value.is_floating_point():
            return value.dtype
        dtype: torch.dtype = example_value(self.site.q.node).dtype
        return dtype

    def places(self, operand: MaskOperand) -> Places:
        """The indices of scores where an operand is applied, over ``b, h, q, kv``."""
        axes = operand.axes or self.site.score_axes
        sizes = dict(zip(axes, operand.sizes, strict=False))
        found = []
        for axis in axes:
            if axis == "bh":
                found.append(B * self.lengths[H] + H)
            elif axis in COORDINATES:
                found.append(COORDINATES[axis])
            else:
                whole, inner = COORDINATES[axis[0]], size_expr(sizes[f"{axis[0]}2"])
                found.append((FloorDiv if axis[1] == "1" else FloorMod)(whole, inner))
        return tuple(found)

    def spread(self, tensor: torch.Tensor, operand: MaskOperand, heads: int) -> torch.Tensor:
        """An operand as [b, h, q, kv], absent and broadcast axes of size one."""
        axes = operand.axes or self.site.score_axes
        while tensor.dim() > len(axes):
            tensor = tensor.squeeze(0)
        tensor = tensor[(None,) * (len(axes) - tensor.dim())]
        if axes[0] == "bh":
            return tensor.reshape(-1, heads if len(tensor) > 1 else 1, *tensor.shape[1:])
        for at, axis in enumerate(axes):
            if axis[1:] == "1":
                pair = tensor.shape[at : at + 2]
                if max(pair) > 1:
                    full = [int(size) for size in operand.sizes[at : at + 2]]
                    wanted = [*tensor.shape[:at], *full, *tensor.shape[at + 2 :]]
                    tensor = tensor.expand(wanted)
                return tensor.flatten(at, at + 1)
        return on_axes(tensor, axes)

    @property
    def device(self) -> torch.device:
        """Of the first operand."""
        device: torch.device = example_value(self.site.masks[0].node).device
        return device

    @property
    def need_gradients(self) -> bool:
        """Whether autograd follows the scores when they are masked, or what is added to them."""
        scores = self._scores_at(0)
        return scores is None or scores.requires_grad or any(map(is_trained, self.site.masks))

    def _scores_at(self, number: int) -> torch.Tensor | None:
        """Scores after an operand was applied to them."""
        value = self.wanted[number].reader.meta.get("example_value")
        return value if isinstance(value, torch.Tensor) else None

    @property
    def key(self) -> Any:
        """What determines their meaning."""
        site = self.site
        roles = tuple((m.role, m.fill, m.times, m.then, m.curved) for m in site.masks)
        scores = (site.score, site.sinks is None, self.need_gradients)
        weights = site.ranked is None, bool(site.dropout), site.zeroed
        plan = (site.kind, site.causal, site.score_axes, self.dtype, weights, scores)
        return (self.part.nodes, self.part.outputs, roles, plan, tuple(self.lengths.items()))


def _lengths(site: AttentionSite) -> Lengths:
    """Sizes of the coordinates, preferring a mask's own symbols: layers may differ in theirs."""
    named = {"b": (site.q, "b"), "h": (site.q, "h"), "q": (site.q, "n"), "kv": (site.k, "n")}
    sizes = {name: size_expr(dimension(*axis)) for name, axis in named.items()}
    for mask in reversed(site.masks):
        shape = example_value(mask.node).shape
        axes = mask.axes or site.score_axes
        for axis, size in zip(reversed(axes), reversed(shape), strict=False):
            if axis in COORDINATES and size_expr(size) != 1:
                sizes[axis] = size_expr(size)
    return {COORDINATES[axis]: size for axis, size in sizes.items()}


@dataclass(frozen=True)
class Keep:
    """What one operand does to the scores.

    Attributes:
        condition: which scores are not masked, over ``b, h, q, kv``.
        fills: what masked scores get, without repetition.
        hidden: which scores are masked by which of the fills, as the operand holds them.
        bias: what it adds to the others, or multiplies them with, over ``b, h, q, kv``; None:
            nothing.
        data: whether only a call knows its numbers, of which the lowest are a mask.
    """

    condition: sympy.Basic
    fills: tuple[float, ...] = ()
    hidden: Cases = ()
    bias: Cases | None = None
    data: bool = False


def is_trained(operand: MaskOperand) -> bool:
    """Whether what an operand adds gets a gradient."""
    return torch.is_grad_enabled() and bool(example_value(operand.node).requires_grad)


def fill_kind(fill: float, dtype: torch.dtype) -> str:
    """How a fill acts on scores of a dtype.

    Returns:
        ``"inf"``; ``"absorbing"``: adding any score to it gives it back; ``"half"``: the least
        float16, which does not absorb; ``"finite"``: anything else.
    """
    rounded = torch.tensor(fill, dtype=torch.float64).to(dtype).item()
    if math.isinf(rounded):
        return "inf"
    if dtype == torch.float16:
        return "half" if rounded == torch.finfo(dtype).min else "finite"
    return "absorbing" if rounded <= ABSORBING else "finite"


def kind_of(fill: float, raw: float, dtype: torch.dtype) -> str:
    """:func:`fill_kind` of a number, ``raw``, that has become ``fill`` where softmax sees it.

    The least float16 stays what it is when scores are scaled later, as they are then as well.
    """
    if fill_kind(raw, dtype) == "half" and fill <= _LOW_HALF:
        return "half"
    return fill_kind(fill, dtype)


def read_operand(
    operand: MaskOperand, tensor: Lifted, fill: Lifted | None, masks: SiteMasks, assumed: float
) -> Keep:
    """The meaning of an operand.

    Args:
        operand: the operand.
        tensor: its lifted value.
        fill: the lifted value of its fill, where that is a node.
        masks: of the attention.
        assumed: fills up to this one count as minus infinity.

    Raises:
        Refused: it has none that is known here.
    """
    axes = masks.places(operand)
    if operand.role == "factor":
        return Keep(sympy.true, bias=_cases_at(tensor.cases, tensor, axes))
    if operand.role == "add":
        return _added(operand, tensor, masks, assumed)
    if tensor.dtype != torch.bool:
        raise Refused("the condition of its masked_fill or where is not a bool tensor")
    condition = at_coordinates(tensor.condition, tensor, axes)
    keep = condition if operand.role == "keep" else sympy.Not(condition)
    value = _fill_value(operand, fill)
    return Keep(keep, (operand.changed(value),), ((sympy.Not(keep), value),))


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


def _added(operand: MaskOperand, tensor: Lifted, masks: SiteMasks, assumed: float) -> Keep:
    """What an operand masks, and what it adds to the scores that it does not."""
    if tensor.dtype == torch.bool:
        raise Refused(
            "it adds a bool mask to the scores, which adds 1 where it is True and masks nothing",
            "use torch.where or masked_fill with float('-inf')",
        )
    kept: list[sympy.Basic] = []
    masked: list[sympy.Basic] = []
    raw: list[float] = []
    cases = merged(case for one in tensor.cases for case in _split(*one))
    for condition, value in cases:
        if isinstance(value, sympy.Basic) or not _masks(operand, value, masks.dtype, assumed):
            kept.append(condition)
        else:
            masked.append(condition)
            raw.append(float(value))
    if raw and operand.curved:
        raise Refused(
            "the scores are masked before a curve, which makes the masked value finite: masked "
            "keys keep some weight",
            "apply the mask after the softcap",
        )
    axes = masks.places(operand)
    # The shorter one of two ways to say it.
    keep = sympy.Or(*kept) if len(kept) < 2 else sympy.Not(sympy.Or(*masked))
    condition = at_coordinates(keep, tensor, axes)
    others = _unmasked(cases, raw, masked)
    bias = None if all(value == 0 for _, value in others) else _cases_at(others, tensor, axes)
    if bias is not None and masks.site.score is None:
        raise Refused("it adds a bias that is not a mask")
    fills = tuple(map(operand.changed, raw))
    hidden = _cases_at(tuple(zip(masked, raw, strict=True)), tensor, axes)
    return Keep(condition, fills, hidden, bias)


def _unmasked(cases: Cases, raw: Sequence[float], masked: Sequence[sympy.Basic]) -> Cases:
    """The cases of what is not masked; what they say of what is does not matter."""
    known = set(sympy.And.make_args(sympy.Not(sympy.Or(*masked)))) if masked else set()
    others = [
        (sympy.And(*(part for part in sympy.And.make_args(c) if part not in known)), value)
        for c, value in cases
        if not _is_in(value, raw)
    ]
    if len(others) == 1:
        return ((sympy.true, others[0][1]),)
    return merged(others) or ((sympy.true, 0),)


def _split(condition: sympy.Basic, value: Value) -> Cases:
    """``(1 - m) * min`` for an integer m that is read: 0 for 1, min for 0, and whatever else."""
    if not isinstance(value, sympy.Basic) or len(value.free_symbols) == 0:
        return ((condition, value),)
    lookups = {node for node in value.atoms(sympy.core.function.AppliedUndef)}
    if len(lookups) != 1:
        return ((condition, value),)
    (lookup,) = lookups
    if _says_zero(condition, value):
        return ((condition, 0),)
    slope = sympy.expand(value).coeff(lookup)
    root = sympy.cancel(lookup - value / slope) if slope.is_number and slope != 0 else None
    if root is None or not root.is_Integer or abs(slope) < -ABSORBING:
        return ((condition, value),)
    masked = root - 1 if slope > 0 else root + 1
    is_root, is_masked = sympy.Eq(lookup, root), sympy.Eq(lookup, masked)
    rest = sympy.And(condition, sympy.Not(is_root), sympy.Not(is_masked))
    return (
        (sympy.And(condition, is_root), 0),
        (sympy.And(condition, is_masked), float(-abs(slope))),
        (rest, value),
    )


def _says_zero(condition: sympy.Basic, value: sympy.Expr) -> bool:
    """Whether a condition is, among others, that an expression is 0."""
    equal = [part for part in sympy.And.make_args(condition) if isinstance(part, sympy.Eq)]
    return any(sympy.expand(p.lhs - p.rhs) in (value, sympy.expand(-value)) for p in equal)


def _masks(operand: MaskOperand, value: Number, dtype: torch.dtype, assumed: float) -> bool:
    """Whether scores to which a number is added have no weight."""
    changed = operand.changed(float(value))
    return (kind_of(changed, float(value), dtype) != "finite" and changed < 0) or changed <= assumed


def _is_in(value: Value, numbers: Sequence[float]) -> bool:
    return not isinstance(value, sympy.Basic) and float(value) in numbers


def _cases_at(cases: Cases, tensor: Lifted, axes: Places) -> Cases:
    """Cases over ``DIMS`` of a tensor that broadcasts against scores with the given axes."""

    def placed(part: Any) -> Any:
        return at_coordinates(part, tensor, axes) if isinstance(part, sympy.Basic) else part

    return tuple((placed(condition), placed(value)) for condition, value in cases)


def at_coordinates(condition: sympy.Basic, tensor: Lifted, axes: Places) -> sympy.Basic:
    """A condition over ``DIMS`` of a mask that broadcasts against scores with the given axes."""
    rank = len(tensor.shape)
    if rank > len(axes):
        extra = rank - len(axes)
        if any(size != 1 for size in tensor.shape[:extra]):
            raise Refused("the mask has more dimensions than the scores")
    return condition.xreplace(dict(zip(DIMS, aligned(rank, axes), strict=False)))


def aligned(rank: int, places: Places) -> list[sympy.Expr]:
    """The indices of a tensor that broadcasts against scores with indices ``places``."""
    lead: list[sympy.Expr] = [sympy.S.Zero] * (rank - len(places))
    return [*lead, *places[max(0, len(places) - rank) :]]

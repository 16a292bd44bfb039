"""What an attention asks of lifting: its masks, what computes them, and what they do to scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from sparse_compile.expr import KV, B, H, Q
from sparse_compile.passes.graph_edit import dimension, example_value, first_reader
from sparse_compile.passes.lift.slice import Slice, Slicer, Wanted
from sparse_compile.passes.lift.value import DIMS, Lifted, reads_data, size_expr
from sparse_compile.sites.site import AttentionSite, MaskOperand, Refused

Lengths = Mapping[sympy.Symbol, sympy.Expr]

#: The coordinates of scores, by the names of their axes.
COORDINATES = {"b": B, "h": H, "q": Q, "kv": KV}


@dataclass(frozen=True)
class SiteMasks:
    """The masks of an attention; equal ones are made by the same nodes.

    Attributes:
        site: the attention.
        wanted: the masks, then the fills that are nodes, each with the first node that reads it.
        part: the slice that computes these.
        lengths: number of batch entries, heads, queries and keys, in torch's size symbols.
    """

    site: AttentionSite
    wanted: tuple[Wanted, ...]
    part: Slice
    lengths: Lengths

    @staticmethod
    def of(site: AttentionSite, slicer: Slicer) -> SiteMasks:
        """The masks of a site that has some.

        Raises:
            Refused: their computation cannot be cut out.
        """
        nodes = [mask.node for mask in site.masks]
        nodes += [mask.fill for mask in site.masks if isinstance(mask.fill, Node)]
        wanted = tuple(Wanted(node, first_reader(site, node)) for node in nodes)
        return SiteMasks(site, wanted, slicer(wanted, site.scope), _lengths(site))

    def traced(self) -> SiteMasks:
        """The same after tracing, which may have fixed a size.

        As when a slice is compared with the length that it is cut from.
        """
        return replace(self, lengths=_lengths(self.site))

    @property
    def dtype(self) -> torch.dtype:
        """Of the scores when they are masked."""
        value = self._scores
        if self.site.kind == "eager" and value is not None and value.is_floating_point():
            return value.dtype
        dtype: torch.dtype = example_value(self.site.q.node).dtype
        return dtype

    @property
    def need_gradients(self) -> bool:
        """Whether autograd follows the scores when they are masked."""
        return self._scores is None or self._scores.requires_grad

    @property
    def _scores(self) -> torch.Tensor | None:
        value = self.wanted[0].reader.meta.get("example_value")
        return value if isinstance(value, torch.Tensor) else None

    @property
    def key(self) -> Any:
        """What determines their meaning."""
        site = self.site
        roles = tuple((mask.role, mask.fill) for mask in site.masks)
        scores = (site.score is None, site.sinks is None, self.need_gradients)
        ranked = site.ranked is None
        plan = (site.kind, site.causal, site.score_axes, self.dtype, ranked, scores)
        return (self.part.nodes, self.part.outputs, roles, plan, tuple(self.lengths.items()))


def _lengths(site: AttentionSite) -> Lengths:
    """Sizes of the coordinates, preferring a mask's own symbols: layers may differ in theirs."""
    named = {"b": (site.q, "b"), "h": (site.q, "h"), "q": (site.q, "n"), "kv": (site.k, "n")}
    sizes = {name: size_expr(dimension(*axis)) for name, axis in named.items()}
    for mask in reversed(site.masks):
        shape = example_value(mask.node).shape
        for axis, size in zip(reversed(site.score_axes), reversed(shape), strict=False):
            if size_expr(size) != 1:
                sizes[axis] = size_expr(size)
    return {COORDINATES[axis]: size for axis, size in sizes.items()}


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

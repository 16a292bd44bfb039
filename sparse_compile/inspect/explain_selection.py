"""What an attention selects in the call that is explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparse_compile.expr import MaskExpr
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.ops.selection import filled, selecting_named
from sparse_compile.passes.graph_edit import with_axes
from sparse_compile.selection import Selection, canonical
from sparse_compile.sites.annotation import bound_mask_named
from sparse_compile.sites.named import INDEX, LISTS
from sparse_compile.sites.operands import Operand
from sparse_compile.sites.plan import Plan, SelectedPlan
from sparse_compile.sites.site import LiftedMask


def pattern_tables(lifted: LiftedMask, shape: ProblemShape, device: torch.device) -> list[Tensor]:
    """The tables that an annotation's pattern makes for a call."""
    lengths = shape.n_q, shape.n_kv, shape.batch, shape.heads
    made = []
    for extra in lifted.extra:
        bound = bound_mask_named(extra.key)
        assert bound is not None, "the model that is explained keeps its annotations"
        made.append(bound.makers[extra.index](device, *lengths).detach().clone())
    return made


@dataclass(frozen=True)
class Selecting:
    """What an attention selects from, in a call.

    Attributes:
        leaf: what selects; None where lists or an index are given.
        content: q and k, [B, H, N, D].
        mask, tables, sizes: who may attend to whom among what is selected.
        found: what is selected.
    """

    leaf: Any
    content: tuple[Tensor, Tensor]
    mask: MaskExpr
    tables: Sequence[Tensor]
    sizes: Sequence[int]
    found: Selection


def selected_in_call(
    plan: Plan,
    shape: ProblemShape,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    kept: Mapping[Node, Tensor],
) -> Selecting | None:
    """What a pattern selects for a site; None where none does, or if it cannot be told.

    Args:
        plan: of the site.
        shape: of the call.
        tables, sizes: of the mask of ``plan.lifted`` in the call.
        kept: q, k and what is given, in the call.
    """
    chosen, site = plan.selected, plan.site
    if chosen is None or isinstance(site.scale, Node):
        return None  # the scale may take part in the scores
    if not all(node in kept for node in (site.q.node, site.k.node, *chosen.given)):
        return None
    given = [kept[node] for node in chosen.given]
    q, k = (_arranged(kept[operand.node], operand) for operand in (site.q, site.k))
    if not chosen.alone:
        # Both masks read the same tables of the program; those of the annotation follow.
        extra = pattern_tables(chosen.lifted, shape, q.device)
        tables = [*tables[: chosen.lifted.n_lifted_tables], *extra]
    mask, data = chosen.lifted.mask, (list(tables), list(sizes))
    if chosen.key in (LISTS, INDEX):
        return Selecting(None, (q, k), mask, *data, _given(chosen, given, shape.n_kv))
    leaf = filled(selecting_named(chosen.key), given)
    with torch.no_grad():
        return Selecting(leaf, (q, k), mask, *data, leaf.select(q, k, mask, *data))


def _given(chosen: SelectedPlan, tensors: Sequence[Tensor], n_kv: int) -> Selection:
    """The lists that a call passes, or that an index says."""
    if chosen.key == LISTS:
        index, count = tensors
        return Selection(index, count, *chosen.units)
    return Selection(*canonical(tensors[0], -(-n_kv // chosen.units[1])), *chosen.units)


def _arranged(value: Tensor, operand: Operand) -> Tensor:
    """An operand as [B, H, N, D]."""
    return with_axes(lambda name, t, arg: getattr(t, name)(arg), value, operand.axes, "bhnd")

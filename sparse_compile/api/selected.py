"""Calls of attention whose mask selects: what runs for them, and the calls of the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.api.data import Tables, canonical_of, data_of, tables_of
from sparse_compile.expr import MaskExpr
from sparse_compile.layout.views.choose import choose_views
from sparse_compile.ops.merged import MERGED_ATTENTION
from sparse_compile.ops.selected import SELECTED_ATTENTION
from sparse_compile.ops.selection import SELECT, name_selecting
from sparse_compile.patterns.base import BoundMask, Pattern
from sparse_compile.patterns.selected import Selected
from sparse_compile.patterns.selecting import Selecting
from sparse_compile.selection.split import split, without_selection
from sparse_compile.sites.annotation import name_mask
from sparse_compile.spec.selected import SelectedSpec

#: n_q, n_kv, batch and heads.
Sizes = tuple[int, int, int, int]
#: Text of the spec, key of the mask, and its tables.
Static = tuple[str, str, Tables]
#: Text of the :class:`SelectedSpec` and of its mask, key of that mask, its tables, and the key of
#: what selects, or one of the words below.
SelectedPart = tuple[str, str, str, Tables, str]
#: The lists are given; an index is given, of which they are made.
_LISTS, _INDEX = "lists", "index"


def planned(bound: BoundMask, owner: Pattern, device: str, sizes: Sizes) -> Static:
    """The plan of a static mask; graphs can find its tables as long as ``owner`` lives."""
    bound = bound.trimmed()
    tables = tables_of(bound.expr)
    key = name_mask(bound, owner) if tables else ""
    return spec_text(bound.expr, device, sizes), key, tables


def spec_text(expr: MaskExpr, device: str, sizes: Sizes) -> str:
    """The text of the spec of a mask on a type of device, at about these sizes."""
    n_q, n_kv, batch, heads = sizes
    spec, _ = choose_views(expr, n_q=n_q, n_kv=n_kv, batch=batch, heads=heads, device_type=device)
    return spec.text


def plan_selected(
    pattern: Pattern, owner: Pattern, device: str, sizes: Sizes
) -> tuple[Static, SelectedPart | None]:
    """What runs for a pattern that selects.

    Args:
        pattern, owner, device, sizes: as for :func:`sparse_compile.api.plan.plan_direct`.

    Returns:
        the plan of its static part, whose text is empty if there is none; and that of the selected
        part, None if a selection adds nothing.

    Raises:
        PatternMisuse, BadPattern: as :func:`split` does.
    """
    parts = split(pattern)
    if parts.selected is None:
        return planned(without_selection(pattern).bound(), owner, device, sizes), None
    static: Static = "", "", ()
    if parts.static is not None:
        static = planned(parts.static, owner, device, sizes)
    expr, leaf = parts.selected.expr, parts.leaf
    tables = tables_of(expr)
    key = name_mask(parts.selected, owner) if tables else ""
    text = SelectedSpec(expr, leaf.unit_q, leaf.unit_kv).text
    return static, (text, expr.text, key, tables, _given(leaf) or name_selecting(leaf, owner))


def _given(leaf: Selecting) -> str:
    """What the caller gives in the place of what selects; empty if nothing."""
    # Indices that are tensors have a number in their place.
    if type(leaf) is not Selected or not isinstance(leaf.index, int):
        return ""
    return _INDEX if leaf.count is None else _LISTS


def lists_of(
    q: Tensor, k: Tensor, mask: Pattern, selected: SelectedPart, given: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Index and count of what a mask selects, and the tables of the mask of selected keys.

    Args:
        q, k, mask, selected, given: as for :func:`by_selection`.
    """
    text, mask_text, key, mask_tables, leaf = selected
    tables: list[Tensor] = []
    if mask_tables:
        rest = mask if torch.compiler.is_compiling() else without_selection(mask)
        lengths = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        tables = data_of(rest, (key, mask_tables, lengths, "", q.device))[0]
    if leaf == _LISTS:
        index, count = (part.detach().to(q.device) for part in given)
    elif leaf == _INDEX:
        unit = units_of(text)[1]
        index, count = canonical_of(given[0], -(-k.shape[2] // unit), q.device)
    else:
        content, held = (q.detach(), k.detach()), [tensor.detach() for tensor in given]
        index, count = SELECT(*content, held, tables, [], mask_text, leaf)
    return index, count, tables


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def units_of(text: str) -> tuple[int, int]:
    """Queries and keys of the units of a spec."""
    spec = SelectedSpec.parse(text)
    return spec.unit_q, spec.unit_kv


def by_selection(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Pattern,
    static: Static,
    selected: SelectedPart,
    given: list[Tensor],
    scale: float,
) -> Tensor:
    """Select, attend to the static part and to what is selected, and merge.

    Args:
        q, k, v: as for :func:`sparse_compile.attention`.
        mask: the pattern.
        static, selected: its plan.
        given: the tensors that it was given, in the order of their numbers.
        scale: factor on the scores.
    """
    text, static_key, static_tables = static
    index, count, tables = lists_of(q, k, mask, selected, given)
    selected_text = selected[0]
    if not text:
        alone: tuple[Tensor, Tensor] = SELECTED_ATTENTION(
            q, k, v, index, count, tables, [], scale, selected_text
        )
        return alone[0]
    own: list[Tensor] = []
    layout: list[Tensor] = []
    if static_tables:
        rest = mask if torch.compiler.is_compiling() else without_selection(mask)
        lengths = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        own, layout = data_of(rest, (static_key, static_tables, lengths, text, q.device))
    merged: Tensor = MERGED_ATTENTION(
        *(q, k, v, index, count, own, [], layout, tables, [], scale, text, selected_text)
    )[0]
    return merged

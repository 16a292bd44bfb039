"""Calls of attention whose mask selects: what runs for them, and the lists of what they select."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.api.data import Tables, canonical_of, data_of, tables_of
from sparse_compile.expr import MaskExpr
from sparse_compile.layout.views.choose import choose_views
from sparse_compile.ops.selection import SELECT, name_selecting
from sparse_compile.patterns.base import BoundMask, Pattern
from sparse_compile.patterns.selected import Selected
from sparse_compile.patterns.selecting import Selecting
from sparse_compile.selection.split import split, without_selection
from sparse_compile.sites.annotation import name_mask
from sparse_compile.spec import AttentionSpec, are_blocks

#: n_q, n_kv, batch and heads.
Sizes = tuple[int, int, int, int]
#: Text of the spec, key of the mask, and its tables.
Static = tuple[str, str, Tables]
#: Text of the spec of all parts, text of the mask of selected keys, key of that mask, its tables,
#: the key of what selects, or one of the words below, and text of the spec if what is selected are
#: blocks for the kernels of blocks, else empty.
SelectedPart = tuple[str, str, str, Tables, str, str]
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
    units, blocks = (leaf.unit_q, leaf.unit_kv), ""
    if static[0]:
        spec = AttentionSpec.parse(static[0]).with_units(expr, *units)
    else:
        spec = AttentionSpec.of_units(expr, *units)
        if are_blocks(*units, device):
            blocks = AttentionSpec.of_listed_blocks(expr, *units).text
    chosen = _given(leaf) or name_selecting(leaf, owner)
    return static, (spec.text, expr.text, key, tables, chosen, blocks)


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
        q, k: as for :func:`sparse_compile.attention`.
        mask: the pattern.
        selected: its plan.
        given: the tensors that it was given, in the order of their numbers.
    """
    text, mask_text, key, mask_tables, leaf, _ = selected
    tables: list[Tensor] = []
    if mask_tables:
        rest = mask if torch.compiler.is_compiling() else without_selection(mask)
        lengths = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        tables = data_of(rest, (key, mask_tables, lengths, k.shape[1], "", q.device))[0]
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
    (part,) = AttentionSpec.parse(text).units
    return part.unit_q, part.unit_kv

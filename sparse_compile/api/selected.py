"""Calls of attention whose mask selects: the lists of what they select."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.api.data import Tables, canonical_of, data_of, tables_of
from sparse_compile.ops.selection import SELECT
from sparse_compile.patterns.base import Pattern
from sparse_compile.selection.split import without_selection
from sparse_compile.sites.named import INDEX, LISTS, NamedMask

#: Text of the mask of selected keys, key of that mask, its tables, what selects, and the units.
SelectedPart = tuple[str, str, Tables, str, tuple[int, int]]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def selected_of(text: str) -> SelectedPart | None:
    """What a named mask selects, as plain values; None if nothing."""
    named = NamedMask.parse(text)
    if named.selected is None:
        return None
    mask = named.selected.mask
    return mask.text, named.selected.key, tables_of(mask), named.selects, named.units


def lists_of(
    q: Tensor,
    k: Tensor,
    selected: SelectedPart,
    given: Sequence[Tensor],
    owner: Pattern | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Index and count of what a mask selects, and the tables of the mask of selected keys.

    Args:
        q, k: as for :func:`sparse_compile.attention`.
        selected: what selects.
        given: the tensors that it was given, in the order of their numbers.
        owner: the pattern, to keep the tables while it does not change; None to make them.
    """
    mask_text, key, mask_tables, leaf, units = selected
    tables: list[Tensor] = []
    if mask_tables:
        rest = None if owner is None else without_selection(owner)
        lengths = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        tables = data_of(rest, (key, mask_tables, lengths, k.shape[1], (), "", q.device))[0]
    if leaf == LISTS:
        index, count = (part.detach().to(q.device) for part in given)
    elif leaf == INDEX:
        index, count = canonical_of(given[0], -(-k.shape[2] // units[1]), q.device)
    else:
        content, held = (q.detach(), k.detach()), [tensor.detach() for tensor in given]
        index, count = SELECT(*content, held, tables, [], mask_text, leaf)
    return index, count, tables

"""The operators that select: what a pattern chooses in a call, and what an index names.

What travels in the graph is the key of what selects, so its data may change without a new
compilation; what it selects are tensors of a fixed shape, so nothing waits for them.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen.precision import full_precision
from sparse_compile.errors import SparseCompileError
from sparse_compile.expr import MaskExpr
from sparse_compile.ops.fresh_size import fresh_size
from sparse_compile.ops.registered import fake_lists, operator
from sparse_compile.patterns.scored import Scored
from sparse_compile.patterns.scorers import Scorer
from sparse_compile.patterns.selecting import Selected, Selecting
from sparse_compile.selection import canonical
from sparse_compile.selection.split import Union
from sparse_compile.sites.annotation import annotation_named

_NUMBERS = itertools.count()
_LEAVES: dict[str, Selecting] = {}


def name_selecting(leaf: Selecting, owner: object) -> str:
    """A key for what selects, known for as long as ``owner`` lives."""
    key = f"s{next(_NUMBERS)}"
    # A leaf may be its own owner, which must not be kept alive here.
    _LEAVES[key] = copy.copy(leaf)
    weakref.finalize(owner, _LEAVES.pop, key, None)
    return key


def selecting_named(key: str) -> Selecting:
    """What :func:`name_selecting` named, or the selection of the annotation with this key.

    Raises:
        SparseCompileError: its owner is gone.
    """
    annotation = annotation_named(key)
    if annotation is not None and annotation.parts is not None:
        return annotation.parts.leaf
    if key not in _LEAVES:
        raise SparseCompileError(
            "sparse_compile: a compiled graph outlived the pattern that selects in it. Keep what "
            "was annotated, or the pattern that was passed, for as long as the compiled function."
        )
    return _LEAVES[key]


def _like_lists(q: Tensor, key: str) -> tuple[Tensor, Tensor]:
    # How many lists there are, and how long, is the pattern's own; only operators read them.
    rows = -(-q.shape[2] // selecting_named(key).unit_q)
    lists, most = fresh_size(), fresh_size()
    return fake_lists(q, [q.shape[0], lists, rows], most)


@operator(_like_lists, recorded=False)
def select(
    q: Tensor,
    k: Tensor,
    given: Sequence[Tensor],
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    mask: str,
    key: str,
) -> tuple[Tensor, Tensor]:
    """The units of keys that are selected for each unit of queries.

    Args:
        q: [B, Hq, Nq, D].
        k: [B, Hkv, Nkv, D].
        given: the tensors in whose place the pattern holds a number: indices of :class:`Selected`,
            and those of scorers.
        tables: the tensors ``t0, t1, ...`` of the mask.
        sizes: the integers ``s0, s1, ...`` of the mask.
        mask: the text of the :class:`MaskExpr` that it selects among.
        key: of what selects, see :func:`name_selecting`.

    Returns:
        index int32 [B, Hs, ceil(Nq / unit_q), K] and count int32 without K, as in
        :class:`sparse_compile.selection.Selection`.
    """
    leaf = filled(selecting_named(key), given)
    with full_precision(q.device.type):
        chosen = leaf.select(q, k, MaskExpr.parse(mask), list(tables), list(sizes))
    return chosen.index, chosen.count


def _like_canonical(index: Tensor) -> tuple[Tensor, Tensor]:
    return fake_lists(index, index.shape[:-1], index.shape[-1])


@operator(_like_canonical)
def canonical_selection(index: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """:func:`sparse_compile.selection.canonical` as an operator: int32 index and count."""
    return canonical(index, units)


#: The operators as nodes of a graph call them.
SELECT = torch.ops.sparse_compile.select.default
CANONICAL_SELECTION = torch.ops.sparse_compile.canonical_selection.default


def filled(leaf: Selecting, given: Sequence[Tensor]) -> Selecting:
    """What selects, with tensors in the place of the numbers that stand for them."""
    if isinstance(leaf, Union):
        return Union(tuple(filled(part, given) for part in leaf.parts))
    if isinstance(leaf, Selected) and isinstance(leaf.index, int):
        count = None if leaf.count is None else given[leaf.count]
        return replace(leaf, index=given[leaf.index], count=count)
    if isinstance(leaf, Scored) and isinstance(leaf.scorer, Scorer) and leaf.scorer.tensors:
        numbers = ((name, getattr(leaf.scorer, name)) for name in leaf.scorer.tensors)
        tensors = {name: given[number] for name, number in numbers if isinstance(number, int)}
        scorer: Any = leaf.scorer
        return replace(leaf, scorer=replace(scorer, **tensors)) if tensors else leaf
    return leaf

"""annotations: what the user said about an attention, and what it does to the mask."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeVar

import sympy
import torch
from torch.fx import Node

from sparse_compile.expr import KV, MaskExpr, Q, renumbered, table_index
from sparse_compile.passes.graph_edit import example_value
from sparse_compile.patterns.base import BoundMask
from sparse_compile.sites.annotation import META_KEY, Annotation, annotation_named
from sparse_compile.sites.plan import Plan
from sparse_compile.sites.site import AttentionSite, LiftedMask, Operand, PatternTable, Rejection
from sparse_compile.spec import EmptyRows

_NOTHING = BoundMask(MaskExpr(sympy.false))

Found = TypeVar("Found", bound=AttentionSite | Rejection | Plan)


def annotation_of(node: Node | None) -> Annotation | None:
    """The annotation of the innermost annotated code that a node comes from."""
    key = ((node.meta if node else {}).get("custom") or {}).get(META_KEY)
    return None if key is None else annotation_named(key)


def with_annotation(found: Found) -> Found:
    """A site or a rejection with its annotation.

    A rejection that has none yet is unmet if the annotation restricts.
    """
    if isinstance(found, Rejection) and found.annotation is None:
        note = annotation_of(found.node)
        return replace(found, annotation=note, unmet=note is not None and not note.promise)
    if isinstance(found, AttentionSite):
        return replace(found, annotation=annotation_of(found.output.node))
    return found


def check_fit(site: AttentionSite) -> None:
    """Let the pattern of a site say whether it fits, where all sizes are known.

    Raises:
        BadPattern: it does not.
    """
    sizes = [_size(site.q, "n"), _size(site.k, "n"), _size(site.q, "b"), _size(site.q, "h")]
    known = [size for size in sizes if isinstance(size, int)]
    if site.annotation is not None and len(known) == len(sizes):
        site.annotation.pattern.check(*known)


def promised_mask(site: AttentionSite) -> LiftedMask | None:
    """The mask of a site whose mask tensors the user promised to be a pattern.

    None without such a promise, and where the code passes no mask tensors: there, what it does is
    known without one.
    """
    note = site.annotation
    if note is None or not note.promise or not site.masks:
        return None
    own = LiftedMask(MaskExpr(sympy.Le(KV, Q) if site.causal else sympy.true))
    return replace(_joined(own, note.bound, note.key), empty_rows=_promised_empty_rows(site, note))


def restricted_mask(site: AttentionSite, lifted: LiftedMask) -> LiftedMask:
    """The mask with the restriction of the user; ``lifted`` itself if that changes nothing.

    A query that the restriction alone leaves without keys yields what the program gives for a
    fully masked one, which is 0 where the program could not have one.
    """
    note = site.annotation
    if note is None or note.promise:
        return lifted
    if note.parts is not None:
        return _joined(lifted, note.parts.static or _NOTHING, f"{note.key}.static")
    joined = _joined(lifted, note.bound, note.key)
    return lifted if joined.mask == lifted.mask else joined


def selected_mask(site: AttentionSite, lifted: LiftedMask) -> LiftedMask | None:
    """The mask of the keys that the user's annotation selects, besides :func:`restricted_mask`.

    None if it selects none.
    """
    note = site.annotation
    if note is None or note.parts is None or note.parts.selected is None:
        return None
    joined = _joined(lifted, note.parts.selected, f"{note.key}.selected")
    return None if joined.mask.predicate == sympy.false else joined


def _joined(lifted: LiftedMask, bound: BoundMask, key: str) -> LiftedMask:
    expr = bound.expr
    rank = {table_index(lookup): len(lookup.args) for lookup in expr.lookups}
    used = sorted(rank)
    first = len(lifted.mask.tables)
    number = {old: first + new for new, old in enumerate(used)}
    pattern = renumbered(expr.predicate, number)
    extra = tuple(PatternTable(key, i, rank[i], expr.tables[i]) for i in used)
    mask = MaskExpr(
        sympy.And(lifted.mask.predicate, pattern),
        (*lifted.mask.tables, *(made.dtype for made in extra)),
        lifted.mask.n_sizes,
    )
    return replace(lifted, mask=mask, extra=(*lifted.extra, *extra))


def _promised_empty_rows(site: AttentionSite, note: Annotation) -> EmptyRows:
    """As the program's own, where its fill is known without reading its mask tensors."""
    fills = {mask.fill for mask in site.masks}
    adds = any(mask.role == "add" for mask in site.masks)
    (fill, *more) = fills
    if site.kind == "sdpa" or adds or more or isinstance(fill, Node) or _sees_itself(site, note):
        return EmptyRows.ZERO
    if site.sinks is not None:
        return EmptyRows.ZERO  # the sink has all the weight
    if fill == -math.inf:
        return EmptyRows.NAN
    return EmptyRows.MEAN if fill <= torch.finfo(torch.bfloat16).min else EmptyRows.ZERO


def _sees_itself(site: AttentionSite, note: Annotation) -> bool:
    diagonal = note.bound.expr.predicate.xreplace({KV: Q})
    return diagonal == sympy.true and bool(_size(site.q, "n") == _size(site.k, "n"))


def _size(operand: Operand, axis: str) -> int | torch.SymInt:
    if axis not in operand.axes:
        return 1
    size: int | torch.SymInt = example_value(operand.node).shape[operand.axes.index(axis)]
    return size

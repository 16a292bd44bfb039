"""restrict: what the user said about an attention, and what it does to the mask."""

from __future__ import annotations

import math
from dataclasses import replace

import sympy
import torch
from torch.fx import Node

from sparse_compile.expr import KV, MaskExpr, Q, ScoreProgram, renumbered, table_index
from sparse_compile.passes.given import given_mask
from sparse_compile.passes.graph_edit import dimension
from sparse_compile.sites.annotation import META_KEY, Annotation, annotation_named
from sparse_compile.sites.named import GIVEN
from sparse_compile.sites.plan import Reading, SelectedPlan, Trace
from sparse_compile.sites.site import AttentionSite, Called, LiftedMask, PatternTable, Rejection
from sparse_compile.spec import EmptyRows

_NOTHING = MaskExpr(sympy.false)
_EVERYTHING = LiftedMask(MaskExpr(sympy.true))
_EVENLY = replace(_EVERYTHING, score=ScoreProgram(sympy.S.Zero, absorbed=True))


def annotation_of(node: Node | None) -> Annotation | None:
    """The annotation of the innermost annotated code that a node comes from."""
    key = ((node.meta if node else {}).get("custom") or {}).get(META_KEY)
    return None if key is None else annotation_named(key)


def with_annotation(found: AttentionSite | Rejection) -> AttentionSite | Rejection:
    """What was found with its annotation; a rejection is unmet if that restricts."""
    if isinstance(found, Rejection):
        note = annotation_of(found.node)
        return replace(found, annotation=note, unmet=note is not None and not note.promise)
    return replace(found, annotation=annotation_of(found.output.node))


def check_fit(site: AttentionSite) -> None:
    """Let the pattern of a site say whether it fits, where all sizes are known.

    Raises:
        BadPattern: it does not.
    """
    sizes = dimension(site.q, "n"), dimension(site.k, "n"), *(dimension(site.q, a) for a in "bh")
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
    if any(mask.role == "factor" for mask in site.masks):
        return None  # what scores are multiplied with is no mask
    own = LiftedMask(MaskExpr(sympy.Le(KV, Q) if site.causal else sympy.true))
    joined = _joined(own, note.bound.expr, note.key)
    policy = _promised_empty_rows(site, note)
    if policy is EmptyRows.MEAN and site.dropout:
        return replace(joined, fallbacks=(_EVENLY,))  # no executor drops from a mean
    return replace(joined, empty_rows=policy)


def restrict(trace: Trace) -> Trace:
    """Each reading of a lifted mask with what the user's annotation says of it."""
    site, lifted = trace.site, trace.lifted
    assert isinstance(lifted, LiftedMask)
    if site.called is not None:
        return replace(trace, readings=(_called(site.annotation, site.called, lifted),))
    masks = [one for one in (lifted, lifted.otherwise) if isinstance(one, LiftedMask)]
    return replace(trace, readings=tuple(_reading(site.annotation, mask) for mask in masks))


def called_mask(site: AttentionSite) -> LiftedMask:
    """What a call attends to whatever is selected, and what becomes of its scores."""
    called = site.called
    assert called is not None
    static = called.mask.static
    if static is not None and static.key == GIVEN:
        return given_mask(site, called)
    return replace(_static_mask(called), score=site.score)


def _static_mask(called: Called) -> LiftedMask:
    static = called.mask.static
    return LiftedMask(_NOTHING) if static is None else _joined(_EVERYTHING, static.mask, static.key)


def _called(note: Annotation | None, called: Called, lifted: LiftedMask) -> Reading:
    """The mask of a call, in which a pattern may select, with its annotation."""
    named = called.mask
    reading = _reading(note, lifted)
    if named.selected is None or reading.selected is not None:
        return reading
    other = _reading(note, _joined(_EVERYTHING, named.selected.mask, named.selected.key))
    alone = reading.mask.mask.predicate == sympy.false
    chosen = SelectedPlan(other.mask, named.selects, named.shown, alone, named.units, called.given)
    mask = other.mask if alone else reading.mask
    return Reading(mask, chosen, changed=reading.changed or other.changed)


def _reading(note: Annotation | None, mask: LiftedMask) -> Reading:
    """A mask with an annotation that restricts.

    A query that the restriction alone leaves without keys yields what the program gives for a
    fully masked one, which is 0 where the program could not have one.
    """
    if note is None or note.promise:
        return Reading(mask)
    if note.parts is None:
        joined = _joined(mask, note.bound.expr, note.key)
        return Reading(mask) if joined.mask == mask.mask else Reading(joined, changed=True)
    static, selected = (
        _joined(mask, _NOTHING if bound is None else bound.expr, f"{note.key}.{part}")
        for part, bound in (("static", note.parts.static), ("selected", note.parts.selected))
    )
    if selected.mask.predicate == sympy.false:
        return Reading(static, changed=True)
    leaf, alone = note.parts.leaf, static.mask.predicate == sympy.false
    chosen = SelectedPlan(selected, note.key, repr(leaf), alone, (leaf.unit_q, leaf.unit_kv))
    return Reading(selected if alone else static, chosen, changed=True)


def _joined(lifted: LiftedMask, expr: MaskExpr, key: str) -> LiftedMask:
    rank = {table_index(lookup): len(lookup.args) for lookup in expr.lookups}
    used = sorted(rank)
    first = len(lifted.mask.tables)
    number = {old: first + new for new, old in enumerate(used)}
    pattern = renumbered(expr.predicate, number)
    extra = tuple(PatternTable(key, i, rank[i], expr.tables[i]) for i in used)
    mask = MaskExpr(
        sympy.And(lifted.mask.predicate, pattern),
        (*lifted.mask.tables, *(made.dtype for made in extra)),
        max(lifted.mask.n_sizes, expr.n_sizes),
    )
    return replace(lifted, mask=mask, extra=(*lifted.extra, *extra))


def _promised_empty_rows(site: AttentionSite, note: Annotation) -> EmptyRows:
    """As the program's own, where its fill is known without reading its mask tensors."""
    adds = any(mask.role == "add" for mask in site.masks)
    fills = [mask.changed(mask.fill) for mask in site.masks if not isinstance(mask.fill, Node)]
    if site.kind == "sdpa" or adds or len(fills) < len(site.masks) or len({*fills}) > 1:
        return EmptyRows.ZERO
    fill, *_ = fills
    diagonal = note.bound.expr.predicate.xreplace({KV: Q})
    if diagonal == sympy.true and dimension(site.q, "n") == dimension(site.k, "n"):
        return EmptyRows.ZERO  # every query sees itself
    if site.sinks is not None:
        return EmptyRows.ZERO  # the sink has all the weight
    if fill == -math.inf:
        return EmptyRows.NAN
    return EmptyRows.MEAN if fill <= torch.finfo(torch.bfloat16).min else EmptyRows.ZERO

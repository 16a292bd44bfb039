"""choose_layout: from a site and its mask to what runs in its place.

The one place where dense and sparse are weighed against each other.
"""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch

from sparse_compile.codegen.generators import block_shapes
from sparse_compile.expr import KV, Q
from sparse_compile.layout.views.choose import choose_views
from sparse_compile.layout.views.split_views import Split
from sparse_compile.options import Options
from sparse_compile.passes.dense_tables import dense_reason
from sparse_compile.passes.graph_edit import example_value
from sparse_compile.sites.plan import Indexer, Plan, SelectedPlan
from sparse_compile.sites.site import (
    AttentionSite,
    BlockScoresSite,
    LiftedMask,
    Operand,
    Rejection,
    ScoringSite,
    SelectedKeys,
)
from sparse_compile.spec import AttentionSpec, EmptyRows, are_blocks
from sparse_compile.spec.block_scores import BlockScoresSpec
from sparse_compile.spec.indexer import IndexerSpec

_DEVICES = ("cuda", "cpu")
#: Stands for a length, batch or head count that is only known when the graph runs.
_UNKNOWN = 4096
#: Of at least so many keys one is kept where lists of single keys cost less than blocks do, by
#: device: measured on the CPU; on a GPU an estimate, for one query head to a key head. There, heads
#: that share keys fill the rows of a tile together.
KEYS_FOR_ONE = {"cpu": 96, "cuda": 64}
_ROWS = 16
#: The same for lists of blocks of keys, or where the scores of all keys need not exist for them.
_UNITS_FOR_ONE = 2


def choose_layout(
    site: AttentionSite, lifted: LiftedMask, device: torch.device, options: Options
) -> Plan | Rejection:
    """Decide what computes ``site``.

    Returns a :class:`Rejection` when the program's own SDPA call is already the best answer.
    """
    if device.type not in _DEVICES:
        reason = f"there is no executor for {device.type} tensors"
        return _left_alone(site, reason, "run the model on a CUDA device or on the CPU")
    if lifted.selection is not None:
        return _selected(site, lifted, lifted.selection, device)
    spec, split = _spec(site, lifted, device, options)
    causal = lifted.mask.predicate == sympy.Le(KV, Q)
    skips_nothing = lifted.mask.predicate == sympy.true
    if (causal or skips_nothing) and _hand_to_sdpa(site, lifted, options):
        return _dense(site, lifted, spec, causal)
    too_large = _too_large(site)
    if too_large:
        return _left_alone(site, too_large, "")
    executor = "triton" if device.type == "cuda" else "cpu"
    reason = dense_reason(lifted) or "only the blocks that its mask allows are visited"
    if lifted.unselected:
        reason += f"; not attention over selected keys: {lifted.unselected}"
    return Plan(site, lifted, spec, executor, reason=reason, split=split)


def choose_selection(
    site: AttentionSite,
    static: LiftedMask,
    selected: LiftedMask,
    device: torch.device,
    options: Options,
) -> Plan | Rejection:
    """Decide what computes ``site``, of whose keys the user's annotation selects some.

    Args:
        site: an attention with an annotation that selects.
        static: the mask of what it attends to whatever is selected; may be false.
        selected: the mask of the others.
        device, options: as for :func:`choose_layout`.
    """
    note = site.annotation
    assert note is not None
    assert note.parts is not None
    if static.selection is not None:
        reason = "its own mask selects keys by index, and its annotation selects others"
        return _left_alone(site, reason, "remove the annotation, or pass both as one mask")
    if device.type not in _DEVICES:
        reason = f"there is no executor for {device.type} tensors"
        return _left_alone(site, reason, "run the model on a CUDA device or on the CPU")
    if too_large := _too_large(site):
        return _left_alone(site, too_large, "")
    leaf, alone = note.parts.leaf, static.mask.predicate == sympy.false
    chosen = SelectedPlan(selected, note.key, repr(leaf), alone)
    executor = "triton" if device.type == "cuda" else "cpu"
    reason = f"as its annotation asks, it is approximated by the keys that {leaf!r} selects"
    if alone:
        spec = _named(site, selected, (leaf.unit_q, leaf.unit_kv), device)
        return Plan(site, selected, spec, executor, reason=reason, selected=chosen)
    own, split = _spec(site, static, device, options)
    reason += ", and those of the static part of the mask"
    spec = own.with_units(selected.mask, leaf.unit_q, leaf.unit_kv)
    return Plan(site, static, spec, executor, reason=reason, split=split, selected=chosen)


def choose_indexer(
    plan: Plan,
    found: ScoringSite | Rejection,
    lifted: LiftedMask | Rejection,
) -> Plan | Rejection:
    """The plan of an attention over selected keys, with the indexer that selects them.

    Args:
        plan: the plan.
        found: what selects the keys.
        lifted: the mask on its scores.

    Returns:
        the plan, whose ``indexer`` is None where all scores must exist; its reason says why. Where
        these are the attention's own, it is left alone instead.
    """
    decided = _indexer(found, lifted)
    if isinstance(decided, str) and plan.site.ranked is not None:
        reason, hint = plan.site.ranked
        return _left_alone(plan.site, f"{reason}; they cannot be ranked apart: {decided}", hint)
    if isinstance(decided, str):
        return replace(plan, reason=f"{plan.reason}; its top-k is left as it is: {decided}")
    own = plan.site.ranked is not None
    whose = "its scores" if own else "the scores of its indexer"
    reason = f"{plan.reason}; {whose} are computed some queries at a time"
    return replace(plan, reason=reason, indexer=decided)


def choose_ranking(plan: Plan, device: torch.device) -> Plan | Rejection:
    """The plan of an attention whose own scores are ranked, to keep the best.

    Returns:
        a :class:`Rejection` where these scores must exist anyway, or ranking them apart from the
        attention costs more than it saves.
    """
    site = plan.site
    if site.ranked is None:
        return plan
    if plan.indexer is None:
        return _left_alone(site, *site.ranked)
    costly = _too_many(plan, device, _for_one_key(site, device))
    return _left_alone(site, costly, "") if costly else plan


def why_no_lists(plan: Plan, device: torch.device) -> str:
    """Why the keys that reach a threshold are better left in a mask tensor; empty if they are not.

    What an index names is listed however much that is, since no mask tensor has to exist then.
    """
    selection = plan.lifted.selection
    if selection is None or selection.waits is None or plan.site.ranked is not None:
        return ""
    single = selection.unit_kv == 1 and plan.indexer is None
    return _too_many(plan, device, _for_one_key(plan.site, device) if single else _UNITS_FOR_ONE)


def _for_one_key(site: AttentionSite, device: torch.device) -> int:
    shared = max(1, _size(site.q, "h") // _size(site.k, "h"))
    rows = 1 if device.type == "cpu" else min(shared, _ROWS)
    return KEYS_FOR_ONE[device.type] // rows


def _too_many(plan: Plan, device: torch.device, for_one: int) -> str:
    """That lists hold too many keys to pay, in words; empty if they pay."""
    selection = plan.lifted.selection
    assert selection is not None
    units = -(-_size(plan.site.k, "n") // selection.unit_kv)
    if not selection.most.isdecimal() or for_one * int(selection.most) <= units:
        return ""
    what = "keys" if selection.unit_kv == 1 else f"units of {selection.unit_kv} keys"
    kept = f"it keeps {selection.most} of {units} {what}"
    return f"{kept}, and on {device.type} lists pay from one of {for_one} on"


def _indexer(found: ScoringSite | Rejection, lifted: LiftedMask | Rejection) -> Indexer | str:
    if isinstance(found, Rejection):
        return found.reason
    if isinstance(lifted, Rejection):
        return f"in its mask, {lifted.reason}"
    if lifted.dense or lifted.selection is not None:
        return "its mask is a tensor"
    masks = found.scores.masks
    if masks and len(lifted.fills) != 1:
        return "its mask changes scores in several ways"
    fill = lifted.fills[0] if masks else float("-inf")
    masked = lifted.mask, fill, bool(masks) and masks[0].role == "add"
    if isinstance(found, BlockScoresSite):
        blocks = BlockScoresSpec(found.size, found.before, *masked, found.padding)
        return Indexer(found, lifted, blocks)
    flags = found.largest, found.is_sorted, found.single
    spec = IndexerSpec(found.before, found.after, found.product, *masked, *flags)
    return Indexer(found, lifted, spec)


def _named(
    site: AttentionSite, lifted: LiftedMask, units: tuple[int, int], device: torch.device
) -> AttentionSpec:
    """Attention to selected keys alone; ``units`` are unit_q and unit_kv."""
    by_blocks = are_blocks(*units, device.type) and not lifted.dense
    make = AttentionSpec.of_listed_blocks if by_blocks else AttentionSpec.of_units
    return make(lifted.mask, *units, lifted.empty_rows, site.where, site.score)


def _selected(
    site: AttentionSite, lifted: LiftedMask, selection: SelectedKeys, device: torch.device
) -> Plan | Rejection:
    """Attention over the keys that an index names; its cost follows their number."""
    too_large = _too_large(site)
    if too_large:
        return _left_alone(site, too_large, "")
    spec = _named(site, lifted, (selection.unit_q, selection.unit_kv), device)
    return Plan(site, lifted, spec, "selected", reason=selection.shown)


def _spec(
    site: AttentionSite, lifted: LiftedMask, device: torch.device, options: Options
) -> tuple[AttentionSpec, Split]:
    """What to compute, in the views that cost least at the lengths of the example."""
    spec, split = choose_views(
        lifted.mask,
        n_q=_size(site.q, "n"),
        n_kv=_size(site.k, "n"),
        batch=_size(site.q, "b"),
        heads=_size(site.q, "h"),
        # Run-time integers are offsets and windows; which, only their values would tell.
        sizes=(0,) * lifted.mask.n_sizes,
        block=options.block,
        shapes=block_shapes(device),
        empty_rows=lifted.empty_rows,
        where=site.where,
    )
    return replace(spec, score=site.score), split


def _size(operand: Operand, axis: str) -> int:
    if axis not in operand.axes:
        return 1
    size = example_value(operand.node).shape[operand.axes.index(axis)]
    if isinstance(size, torch.SymInt):
        hint = size.node.hint  # what the graph was captured with; None if nothing is known
        return _UNKNOWN if hint is None else int(hint)
    return int(size)


def _too_large(site: AttentionSite) -> str:
    """Which static size is beyond the kernels, in words; empty if none is."""
    for axis, limit, name in (("d", 256, "head dim"), ("b", 65535, "batch"), ("h", 65535, "heads")):
        for operand in (site.q, site.v):
            if axis not in operand.axes:
                continue
            size = example_value(operand.node).shape[operand.axes.index(axis)]
            if isinstance(size, int) and size > limit:
                return f"its {name} of {size} is beyond the {limit} that the kernels handle"
    return ""


def _left_alone(site: AttentionSite, reason: str, hint: str) -> Rejection:
    return Rejection(reason, hint, site.where, site.output.node)


def _hand_to_sdpa(site: AttentionSite, lifted: LiftedMask, options: Options) -> bool:
    """Whether SDPA can say it: it knows no score programs, and does not return what sinks need."""
    plain = site.score is None and site.sinks is None
    return plain and options.dense == "sdpa" and lifted.empty_rows is EmptyRows.ZERO


def _dense(
    site: AttentionSite, lifted: LiftedMask, spec: AttentionSpec, causal: bool
) -> Plan | Rejection:
    what = "is causal" if causal else "lets every query see every key"
    # Unless a restriction made it so, in which case the call still has to be told.
    if site.kind == "sdpa" and not site.masks and site.causal == causal:
        reason = f"its mask {what}, and PyTorch's own kernel already skips what that allows"
        hint = 'options={"dense": "rewrite"} uses block-sparse kernels all the same'
        return _left_alone(site, reason, hint)
    reason = f"its mask {what}: SDPA's dense kernel is fastest, without the mask tensor"
    return Plan(site, lifted, spec, "sdpa", causal, reason)

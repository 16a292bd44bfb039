"""propose: every way to run an attention, with what it is predicted to cost or why it cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
import torch

from sparse_compile.expr import KV, Dropout, Q
from sparse_compile.layout.cost import Candidate, dense, sdpa, why_not_listed
from sparse_compile.layout.views.split_views import Split
from sparse_compile.ops.operands import WIDEST, WIDEST_UNITS
from sparse_compile.options import Options
from sparse_compile.passes.decide.pick import Price, shape_of, views_for
from sparse_compile.passes.graph_edit import dimension, expected
from sparse_compile.sites.plan import Indexer, Plan, Proposal, Reading, SelectedPlan, Trace
from sparse_compile.sites.site import AttentionSite, LiftedMask, Ranking, Rejection, SelectedKeys
from sparse_compile.spec import AttentionSpec, EmptyRows, are_blocks
from sparse_compile.spec.target import Target

_EXECUTORS = {"cuda": "triton", "cpu": "cpu"}
#: Batch entries and heads.
_MOST = 65535, 65535
_FORCED = 'options={"decide": "sparse"} asks for another'


def propose(trace: Trace, options: Options, target: Target, sharing: int) -> Trace:
    """Every way to run a site; the program as it is comes last.

    Args:
        trace: of the site, with its readings.
        options: ``block``, ``dense`` and ``decide`` matter here.
        target: what it would run on.
        sharing: attentions of the graph with this mask, which share its layout.
    """
    trace = replace(trace, target=target)
    impossible = _impossible(trace.site, trace.readings, target)
    if impossible is not None:
        refused = Proposal(Candidate("sparse", (), impossible[0]), trace.rejected(*impossible))
        return replace(trace, proposals=(refused,))
    proposer = _Proposer(trace, options, Price(target, sharing))
    ways: list[Proposal] = []
    for reading in trace.readings:
        ways.append(proposer.way(reading, ways))
    return replace(trace, proposals=(*ways, proposer.as_it_is()))


def _impossible(
    site: AttentionSite, readings: Sequence[Reading], target: Target
) -> tuple[str, str] | None:
    """Why nothing but the program itself can run a site, and what would change that."""
    if target.kind not in _EXECUTORS:
        reason = f"there is no executor for {target.kind} tensors"
        return reason, "run the model on a CUDA device or on the CPU"
    ranks = any(reading.mask.selection is not None for reading in readings)
    return None if ranks else site.ranked


@dataclass(frozen=True)
class _Proposer:
    """What is asked: a trace with its readings, options, and what ways to run it cost."""

    trace: Trace
    options: Options
    price: Price

    def way(self, reading: Reading, before: Sequence[Proposal]) -> Proposal:
        """The way to run one reading of a mask; ``before`` are those to run the others."""
        site, mask = self.trace.site, reading.mask
        if reading.selected is not None:
            return self._besides(mask, reading.selected)
        if mask.selection is not None:
            return self._listed(mask, mask.selection)
        spec, split = self._spec(mask)
        causal = mask.mask.predicate == sympy.Le(KV, Q)
        hides_nothing = mask.mask.predicate == sympy.true
        # SDPA knows no score programs, and does not return what sinks need.
        plain = mask.score is None and site.sinks is None and self.options.dense == "sdpa"
        filled = mask.fallbacks or mask.empty_rows is not EmptyRows.ZERO
        if (causal or hides_nothing) and plain and not filled:
            return self._without_mask(Plan(site, mask, spec, "sdpa", causal))
        reason = "only the blocks that its mask allows are visited"
        if mask.dense:
            reason = "its blocks are found from the mask tensor in each call"
        why = [mask.unselected, *(way.cost.refusal for way in before)]
        reason += "".join(f"; not attention over selected keys: {text}" for text in why if text)
        plan = Plan(site, mask, spec, self._executor, reason=reason, split=split)
        return self._proposal(plan, _too_large(site))

    def as_it_is(self) -> Proposal:
        """The program as it is, unless the user says that it may not be."""
        note, site = self.trace.annotation, self.trace.site
        refusal = _FORCED if self.options.decide == "sparse" else ""
        if note is not None and not note.promise:
            refusal = "its annotation restricts what it attends to"
        if site.kind == "call":
            refusal = "as it is it is a call of this library's attention, which is sparse itself"
        work = Price.work_of(site)
        computed = [reading.mask.learned for reading in self.trace.readings]
        # What is computed for each pair, where less says as much, is computed once for all layers.
        if any(one is not None and "kv - q" in "".join(one.shown) for one in computed):
            work = replace(work, made=work.added / self.price.sharing)
        cost = replace(dense(self.price.target, work), refusal=refusal)
        return Proposal(cost, self.trace.rejected(refusal))

    @property
    def _executor(self) -> str:
        return _EXECUTORS[self.price.target.kind]

    def _proposal(self, plan: Plan, refusal: str, hint: str = "") -> Proposal:
        cost = replace(self.price.of(plan), refusal=refusal)
        return Proposal(cost, self.trace.rejected(refusal, hint) if refusal else plan)

    # What there is in a mask alone ----------------------------------------------------------------

    def _without_mask(self, plan: Plan) -> Proposal:
        """SDPA's dense kernel, where the mask hides nothing that it does not skip itself."""
        site = plan.site
        what = "is causal" if plan.causal else "lets every query see every key"
        cost = sdpa(self.price.target, Price.work_of(site))
        # Unless a restriction made it so, in which case the call still has to be told.
        if site.kind == "sdpa" and not site.masks and site.causal == plan.causal:
            reason = f"its mask {what}, and PyTorch's own kernel already skips what that allows"
            hint = 'options={"dense": "rewrite"} uses block-sparse kernels all the same'
            return Proposal(replace(cost, refusal=reason), self.trace.rejected(reason, hint))
        reason = f"its mask {what}: SDPA's dense kernel is fastest, without the mask tensor"
        return Proposal(cost, replace(plan, reason=reason))

    def _spec(self, mask: LiftedMask) -> tuple[AttentionSpec, Split]:
        """What to compute, in the views that cost least at the lengths of the example."""
        site = self.trace.site
        work, whole = Price.work_of(site), self._meant(AttentionSpec(mask.mask), mask)
        need = self.price.need(site, whole, work)
        spec, split = views_for(mask.mask, need, shape_of(work), self.options.block)
        return self._meant(spec, mask), split

    # What a pattern selects -----------------------------------------------------------------------

    def _besides(self, mask: LiftedMask, chosen: SelectedPlan) -> Proposal:
        """Attention to what the user's pattern selects, and to the static part of the mask."""
        site, split = self.trace.site, None
        note, called = site.annotation, site.called
        by_call = called is not None and called.mask.selected is not None
        reason = "as its annotation asks, it is approximated by"
        reason = "as it is called, it attends to" if by_call else reason
        reason += f" the keys that {chosen.shown} selects"
        if chosen.alone:
            spec = self._of_units(chosen.lifted, chosen.units)
        else:
            own, split = self._spec(mask)
            spec = own.with_units(chosen.lifted.mask, *chosen.units)
            reason += ", and those of the static part of the mask"
        plan = Plan(site, mask, spec, self._executor, reason=reason, split=split, selected=chosen)
        refusal, hint = _too_large(site, chosen.alone and called is not None), ""
        refusal = refusal or _drops(site)
        if by_call and note is not None and note.parts is not None:
            refusal = "the pattern that it is called with selects keys, and its annotation others"
            hint = "remove the annotation"
        if mask.selection is not None:
            refusal = "its own mask selects keys by index, and its annotation selects others"
            hint = "remove the annotation, or pass both as one mask"
        return self._proposal(plan, refusal, hint)

    def _of_units(self, mask: LiftedMask, units: tuple[int, int]) -> AttentionSpec:
        """Attention to selected keys alone; ``units`` are unit_q and unit_kv."""
        by_blocks = are_blocks(*units, self.price.target.kind) and not mask.dense
        make = AttentionSpec.of_listed_blocks if by_blocks else AttentionSpec.of_units
        return self._meant(make(mask.mask, *units), mask)

    def _meant(self, spec: AttentionSpec, mask: LiftedMask) -> AttentionSpec:
        site = self.trace.site
        learned = () if mask.score is None else mask.score.learned
        dropout = Dropout(site.dropout, len(learned)) if site.dropout else None
        return replace(
            spec,
            empty_rows=mask.empty_rows,
            where=site.where,
            score=mask.score,
            dropout=dropout,
        )

    # What the program's own mask selects ----------------------------------------------------------

    def _listed(self, mask: LiftedMask, selection: SelectedKeys) -> Proposal:
        """Attention over the keys that an index names, or that reach a threshold."""
        site = self.trace.site
        spec = self._of_units(mask, (selection.unit_q, selection.unit_kv))
        plan = Plan(site, mask, spec, "selected", reason=selection.shown)
        refusal, hint = _too_large(site), ""
        made = None if selection.ranking is None else _indexer(selection.ranking)
        if isinstance(made, Indexer):
            whose = "the scores of its indexer" if site.ranked is None else "its scores"
            reason = f"{plan.reason}; {whose} are computed some queries at a time"
            plan = replace(plan, reason=reason, indexer=made)
        elif site.ranked is not None:
            refusal, hint = site.ranked
            refusal += f"; they cannot be ranked apart: {made}" if made else ""
        elif made is not None:
            plan = replace(plan, reason=f"{plan.reason}; its top-k is left as it is: {made}")
        refusal = refusal or _drops(site) or _too_many(plan, selection, self.price.target)
        return self._proposal(plan, refusal, hint)


def _too_large(site: AttentionSite, units: bool = False) -> str:
    """Which static size is beyond the kernels, of selected units or all, in words; or nothing."""
    widths = WIDEST_UNITS if units else WIDEST
    for axis, limits, name in (
        ("d", widths, "head dim"),
        ("b", _MOST, "batch"),
        ("h", _MOST, "heads"),
    ):
        for operand, limit in zip((site.q, site.v), limits, strict=True):
            size = dimension(operand, axis)
            if not isinstance(size, torch.SymInt) and size > limit:
                return f"its {name} of {size} is beyond the {limit} that the kernels handle"
    return ""


def _drops(site: AttentionSite) -> str:
    """That weights of selected keys cannot be dropped, in words; or nothing."""
    return "dropout on the weights of selected keys has no kernel" if site.dropout else ""


def _too_many(plan: Plan, selection: SelectedKeys, target: Target) -> str:
    """That lists hold too many keys to pay, in words; empty if they pay.

    What an index names is listed however much that is, since no mask tensor has to exist then.
    """
    own = plan.site.ranked is not None
    if not selection.most.isdecimal() or (selection.waits is None and not own):
        return ""
    q, k = plan.site.q, plan.site.k
    shared = max(1, expected(q, "h") // expected(k, "h"))
    units = -(-expected(k, "n") // selection.unit_kv)
    unit_kv, scored = selection.unit_kv, own or (selection.unit_kv == 1 and plan.indexer is None)
    return why_not_listed(target, int(selection.most), units, unit_kv, shared, scored)


def _indexer(ranking: Ranking) -> Indexer | str:
    """The scores of a selection, computed apart; or why all of them must exist."""
    found, lifted = ranking.site, ranking.lifted
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
    adds = bool(masks) and masks[0].role == "add"
    return Indexer(found, lifted, replace(found.spec, mask=lifted.mask, fill=fill, adds=adds))

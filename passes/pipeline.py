"""The pipeline, in the order in which it runs: what becomes of each attention of a graph, and why.

Each pass hands on what is known about an attention as a :class:`Trace`, which the next one adds to.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch.fx import GraphModule

from sparse_compile.errors import RestrictionFailed
from sparse_compile.options import Options
from sparse_compile.passes.decide.pick import decide, declares_range
from sparse_compile.passes.decide.propose import propose
from sparse_compile.passes.expand import expand
from sparse_compile.passes.find import find_attention, find_indexer
from sparse_compile.passes.graph_edit import device_of
from sparse_compile.passes.lift import LiftCache, lift_mask
from sparse_compile.passes.restrict import (
    called_mask,
    check_fit,
    promised_mask,
    restrict,
    with_annotation,
)
from sparse_compile.passes.rewrite.lists import hold_layouts, remember_given, share_lists
from sparse_compile.passes.rewrite.rewriter import Rewriter
from sparse_compile.passes.rewrite.scored import write_out_scored
from sparse_compile.passes.rewrite.shadows import settle
from sparse_compile.passes.stays_dense import find_dense, warn_of
from sparse_compile.sites.plan import Plan, Trace
from sparse_compile.sites.shadow import Expanded
from sparse_compile.sites.site import LiftedMask, Ranking, Rejection
from sparse_compile.spec.target import Target

PASSES = ("expand", "find", "lift", "restrict", "propose", "decide", "rewrite")


def run(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> tuple[Trace, ...]:
    """All passes. Changes ``gm`` in place.

    Returns:
        for each attention seen, in graph order, what was found out and decided.

    Raises:
        BadPattern, RestrictionFailed: an annotation does not fit, or cannot be honoured.
    """
    traces = plan(gm, example_inputs, options)
    dense = find_dense(gm, traces, example_inputs, options)
    rewrite(gm, traces, options)
    warn_of(dense)
    return traces


def plan(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    target: Target | None = None,
) -> tuple[Trace, ...]:
    """All passes but the last: ``gm`` computes what it does, and nothing reads what is added.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs.
        options: of the backend.
        target: what to plan for; default the device of each attention.
    """
    guards, cache = not declares_range(example_inputs), LiftCache()
    traces = find(gm, expand(gm, example_inputs))
    lifting = partial(lift, inputs=example_inputs, options=options, cache=cache)
    traces = _each("lift", lifting, traces)
    traces = _each("restrict", restrict, traces)
    sharing = Counter(_masks(trace) for trace in traces if trace.decision is None)

    def proposed(trace: Trace) -> Trace:
        on = target or Target.of(device_of(trace.site.q.node))
        return propose(trace, options, on, sharing[_masks(trace)])

    traces = _each("propose", proposed, traces)
    return _each("decide", lambda trace: decide(trace, sharing[_masks(trace)], guards), traces)


def find(gm: GraphModule, expanded: Expanded) -> tuple[Trace, ...]:
    """Every attention of a graph, with its annotation."""
    began = time.perf_counter()
    found = [with_annotation(one) for one in find_attention(gm, expanded)]
    traces = [Trace(one, decision=one if isinstance(one, Rejection) else None) for one in found]
    traces = [replace(trace, shadow=expanded.shadow_of(trace.node)) for trace in traces]
    seconds = time.perf_counter() - began
    return tuple(trace.timed("find", seconds / len(traces)) for trace in traces)


def lift(trace: Trace, inputs: Sequence[Any], options: Options, cache: LiftCache) -> Trace:
    """What the masks of a site mean, and what scores the keys that they select."""
    site = trace.site
    check_fit(site)
    if site.called is not None:
        return replace(trace, lifted=called_mask(site))
    promised = promised_mask(site)
    if promised is not None:
        return replace(trace, lifted=replace(promised, score=site.plain_score))
    lifted = lift_mask(site, inputs, options, cache)
    if isinstance(lifted, Rejection):
        rejected = trace.rejected(lifted.reason, lifted.hint)
        return replace(trace, lifted=lifted, decision=rejected)
    scores, selection = find_indexer(site, lifted), lifted.selection
    if scores is not None and selection is not None:
        above: LiftedMask | Rejection = (
            scores
            if isinstance(scores, Rejection)
            else lift_mask(scores.scores, inputs, options, cache)
        )
        selection = replace(selection, ranking=Ranking(scores, above))
    return replace(trace, lifted=replace(lifted, selection=selection))


def rewrite(gm: GraphModule, traces: Sequence[Trace], options: Options) -> None:
    """Put what was decided in the place of each attention; lists that are equal are made once.

    Raises:
        RestrictionFailed: what an annotation restricts was left as it was.
    """
    settle(traces)
    rewriter = Rewriter(options.check_promises)
    for trace in traces:
        if isinstance(trace.decided, Plan):
            rewriter.apply(trace.decided)
        elif trace.decided.unmet:
            raise _restriction_failed(trace.decided)
    written_out = write_out_scored(gm)
    if not written_out and not any(isinstance(trace.decided, Plan) for trace in traces):
        return
    rewriter.finish()
    share_lists(gm)
    hold_layouts(gm)
    if options.masks == "stable":
        remember_given(gm)
    for module in gm.modules():
        if isinstance(module, GraphModule):
            module.graph.lint()
            module.recompile()


def _each(name: str, step: Callable[[Trace], Trace], traces: Sequence[Trace]) -> tuple[Trace, ...]:
    """A pass over the attentions about which nothing is decided yet, each with what it took."""
    done = []
    for trace in traces:
        began = time.perf_counter()
        if trace.decision is None:
            trace = step(trace).timed(name, time.perf_counter() - began)
        done.append(trace)
    return tuple(done)


def _masks(trace: Trace) -> Any:
    return trace.site.masks, trace.site.called


def _restriction_failed(rejected: Rejection) -> RestrictionFailed:
    assert rejected.annotation is not None
    where = rejected.where[-1] if rejected.where else "an unknown place"
    hint = f" To have it rewritten, {rejected.hint}." if rejected.hint else ""
    return RestrictionFailed(
        f"sparse_compile: {rejected.annotation.shown()} cannot be honoured at {where}: "
        f"{rejected.reason}.{hint} Or remove the annotation."
    )

"""The backend: what ``torch.compile(model, backend="sparse_compile")`` runs on each graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule

from sparse_compile.errors import RestrictionFailed
from sparse_compile.inductor import compile_with_inductor
from sparse_compile.options import Options
from sparse_compile.passes import (
    Decision,
    LiftCache,
    Rewriter,
    check_fit,
    choose_cheapest,
    choose_indexer,
    choose_layout,
    choose_ranking,
    choose_selection,
    find_attention,
    find_indexer,
    hold_layouts,
    lift_mask,
    promised_mask,
    remember_given,
    restricted_mask,
    selected_mask,
    share_lists,
    why_no_lists,
    with_annotation,
)
from sparse_compile.passes.graph_edit import device_of
from sparse_compile.sites.plan import Plan
from sparse_compile.sites.site import AttentionSite, Rejection


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Rewrite the attention of a captured graph to block-sparse kernels; Inductor does the rest.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs.
        options: fields of :class:`sparse_compile.options.Options`.
        mode: as for Inductor, such as ``"max-autotune"``.

    Raises:
        UnknownOption, BadOption: before anything is compiled.
        BadPattern, RestrictionFailed: an annotation does not fit, or cannot be honoured.
    """
    parsed = Options.parse(options)
    plan_and_rewrite(gm, example_inputs, parsed)
    return compile_with_inductor(gm, example_inputs, mode=mode, inductor_options=parsed.inductor)


def plan_and_rewrite(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[Decision, ...]:
    """The passes, in order: find, lift, choose, rewrite, share. Changes ``gm`` in place.

    Returns:
        for each attention seen, in graph order, its :class:`Plan` or the :class:`Rejection` that
        says why it was left alone.
    """
    decisions = plan_graph(gm, example_inputs, options)
    rewriter = Rewriter(options.check_promises)
    for decision in decisions:
        if isinstance(decision, Plan):
            rewriter.apply(decision)
        elif decision.unmet:
            raise _restriction_failed(decision)
    rewriter.finish()
    share_lists(gm)
    hold_layouts(gm)
    if options.masks == "stable":
        remember_given(gm)
    return decisions


def plan_graph(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[Decision, ...]:
    """Find, lift and choose, without touching ``gm``."""
    cache, sites = LiftCache(), tuple(find_attention(gm))
    decisions = [_decide(found, example_inputs, options, cache) for found in sites]
    if options.decide == "cost":
        decisions = choose_cheapest(decisions, example_inputs)
    return tuple(with_annotation(decision) for decision in decisions)


def _decide(
    found: AttentionSite | Rejection,
    example_inputs: Sequence[Any],
    options: Options,
    cache: LiftCache,
) -> Decision:
    found = with_annotation(found)
    if isinstance(found, Rejection):
        return found
    check_fit(found)
    decision, device = _decided(found, example_inputs, options, cache), device_of(found.q.node)
    if isinstance(decision, Plan) and (why := why_no_lists(decision, device)):
        decision = _decided(found, example_inputs, options, cache, why)
    if isinstance(decision, Plan):
        decision = choose_ranking(decision, device)
    return decision


def _decided(
    found: AttentionSite,
    example_inputs: Sequence[Any],
    options: Options,
    cache: LiftCache,
    no_lists: str = "",
) -> Decision:
    lifted = promised_mask(found) or lift_mask(found, example_inputs, options, cache, no_lists)
    if isinstance(lifted, Rejection):
        return with_annotation(lifted)
    restricted = restricted_mask(found, lifted)
    selected, device = selected_mask(found, lifted), device_of(found.q.node)
    if selected is not None:
        return with_annotation(choose_selection(found, restricted, selected, device, options))
    decision = choose_layout(found, restricted, device, options)
    if isinstance(decision, Rejection) and restricted is lifted:
        return replace(decision, annotation=found.annotation)  # left alone, it already obeys
    if isinstance(decision, Plan):
        decision = _with_indexer(decision, example_inputs, options, cache)
    return decision


def _with_indexer(
    plan: Plan, example_inputs: Sequence[Any], options: Options, cache: LiftCache
) -> Decision:
    """Find, lift and choose for what selects the keys of an attention, if its mask says."""
    found = find_indexer(plan.site, plan.lifted)
    if found is None:
        return plan
    if isinstance(found, Rejection):
        return choose_indexer(plan, found, found)
    return choose_indexer(plan, found, lift_mask(found.scores, example_inputs, options, cache))


def _restriction_failed(rejected: Rejection) -> RestrictionFailed:
    assert rejected.annotation is not None
    where = rejected.where[-1] if rejected.where else "an unknown place"
    hint = f" To have it rewritten, {rejected.hint}." if rejected.hint else ""
    return RestrictionFailed(
        f"sparse_compile: {rejected.annotation.shown()} cannot be honoured at {where}: "
        f"{rejected.reason}.{hint} Or remove the annotation."
    )

"""The backend: what ``torch.compile(model, backend="sparse_compile")`` runs on each graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from sparse_compile.inductor import compile_with_inductor
from sparse_compile.options import Options
from sparse_compile.passes import (
    Decision,
    LiftCache,
    Rewriter,
    choose_layout,
    find_attention,
    lift_mask,
)
from sparse_compile.passes.graph_edit import device_of
from sparse_compile.plan import Plan
from sparse_compile.site import AttentionSite, Rejection


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
    """
    parsed = Options.parse(options)
    plan_and_rewrite(gm, example_inputs, parsed)
    return compile_with_inductor(gm, example_inputs, mode=mode, inductor_options=parsed.inductor)


def plan_and_rewrite(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[Decision, ...]:
    """The passes, in order: find, lift, choose, rewrite. Changes ``gm`` in place.

    Returns:
        for each attention seen, in graph order, its :class:`Plan` or the :class:`Rejection` that
        says why it was left alone.
    """
    decisions = plan_graph(gm, example_inputs, options)
    rewriter = Rewriter()
    for decision in decisions:
        if isinstance(decision, Plan):
            rewriter.apply(decision)
    rewriter.finish()
    return decisions


def plan_graph(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[Decision, ...]:
    """Find, lift and choose, without touching ``gm``."""
    cache = LiftCache()
    return tuple(_decide(found, example_inputs, options, cache) for found in find_attention(gm))


def _decide(
    found: AttentionSite | Rejection,
    example_inputs: Sequence[Any],
    options: Options,
    cache: LiftCache,
) -> Decision:
    if isinstance(found, Rejection):
        return found
    lifted = lift_mask(found, example_inputs, options, cache)
    if isinstance(lifted, Rejection):
        return lifted
    return choose_layout(found, lifted, device_of(found.q.node), options)

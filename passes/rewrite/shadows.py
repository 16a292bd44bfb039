"""settle: what was written out beside an opaque call takes its place, or goes."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from sparse_compile.sites.plan import Plan, Trace
from sparse_compile.sites.shadow import Shadow


def settle(traces: Sequence[Trace]) -> None:
    """Keep the shadows in which an attention is to be rewritten, and erase the others."""
    shadows = {trace.shadow.call: trace.shadow for trace in traces if trace.shadow is not None}
    planned = (trace.shadow for trace in traces if isinstance(trace.decided, Plan))
    kept = {shadow.call for shadow in planned if shadow is not None}
    for call, shadow in shadows.items():
        if call in kept:
            _take_its_place(shadow)
        else:
            for node in reversed(shadow.nodes):
                node.graph.erase_node(node)


def _take_its_place(shadow: Shadow) -> None:
    for old, new in shadow.outputs:
        old.replace_all_uses_with(new)
        # Operands and masks of other sites may be this very node: it stays, as another name.
        old.target, old.args, old.kwargs = operator.getitem, ((new,), 0), {}
    if not shadow.call.users and all(old is not shadow.call for old, _ in shadow.outputs):
        shadow.call.graph.erase_node(shadow.call)

"""Attention that stays dense although its mask is sparse: told once, with what would change that.

``explain`` tells of every attention why it is left as it is. Who does not ask is warned of those
alone for which it matters: the mask hides whole blocks in the example, block-sparse kernels would
be faster, and something in the program stands in the way.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from sparse_compile.errors import StaysDense
from sparse_compile.layout.cost import RATES, Coverage, Workload, blocks, cheapest, dense
from sparse_compile.options import Options
from sparse_compile.passes.graph_edit import device_of, example_value
from sparse_compile.passes.lift.examples import Examples
from sparse_compile.passes.lift.slice import Slicer, Wanted
from sparse_compile.sites.operands import MaskOperand, Scope
from sparse_compile.sites.place import place
from sparse_compile.sites.plan import Trace
from sparse_compile.sites.site import AttentionSite, Refused, Rejection
from sparse_compile.spec.target import Target

#: Queries and keys of the blocks that are looked at.
_BLOCK = 32
#: Pairs of a mask that is looked at, batch entries and heads included.
_MOST = 1 << 26
#: What is added to scores as a mask is no more than this.
_HIDDEN = -1e4
#: Features of q, k and v where no site is known.
_FEATURES = 128
#: So many places are named of those that are alike.
_SHOWN = 4


@dataclass(frozen=True)
class Dense:
    """An attention that stays dense.

    Attributes:
        rejection: why.
        share: of the blocks of its mask, in the example, those that hold an allowed pair.
    """

    rejection: Rejection
    share: float


#: Source lines and reasons that were told in this process.
_TOLD: set[tuple[str, str]] = set()


def find_dense(
    gm: GraphModule, traces: Sequence[Trace], inputs: Sequence[Any], options: Options
) -> tuple[Dense, ...]:
    """The attentions of a graph, before it is rewritten, of which there is something to tell.

    Args:
        gm: the graph that Dynamo captured.
        traces: of its attentions.
        inputs: its inputs.
        options: of the backend.
    """
    left = [trace for trace in traces if _stands_in_the_way(trace)]
    masks = [_masks(trace) for trace in left]
    sharing, looking = Counter(masks), _Looking(gm, inputs)
    found = []
    for trace, hiding in zip(left, masks, strict=True):
        share = looking.share(trace, hiding)
        if share is not None and _pays(trace, share, sharing[hiding], options):
            assert isinstance(trace.decision, Rejection)
            found.append(Dense(trace.decision, share))
    return tuple(found)


def _stands_in_the_way(trace: Trace) -> bool:
    """Whether it is something in the program, not its cost, that leaves an attention as it is."""
    if not isinstance(trace.decision, Rejection) or trace.node is None:
        return False
    lifted = trace.lifted
    if lifted is None or isinstance(lifted, Rejection):
        return True
    able = any(not way.cost.refusal for way in trace.proposals[:-1])
    return lifted.selection is None and not able


def _masks(trace: Trace) -> tuple[MaskOperand, ...]:
    """What hides its scores, as far as that is known."""
    return tuple(mask for mask in trace.found.masks if mask.role != "factor")


class _Looking:
    """Looks at masks as they are in the example."""

    def __init__(self, gm: GraphModule, inputs: Sequence[Any]) -> None:
        self._scope = Scope(gm)
        self._inputs = inputs
        self._slicer = Slicer()
        self._known: dict[Any, float | None] = {}

    def share(self, trace: Trace, masks: tuple[MaskOperand, ...]) -> float | None:
        """The share of the blocks that hold an allowed pair; None where that is not known."""
        node, causal = trace.node, isinstance(trace.found, AttentionSite) and trace.found.causal
        assert node is not None
        if not masks or node.graph is not self._scope.gm.graph:
            return None
        key = masks, causal
        if key not in self._known:
            try:
                self._known[key] = _share(self._kept(masks, node), causal)
            except Exception:  # The user's operators: anything can be raised, and nothing is told.
                self._known[key] = None
        return self._known[key]

    def _kept(self, masks: tuple[MaskOperand, ...], reader: Node) -> Tensor:
        """Who may attend to whom, [..., q, kv]."""
        part = self._slicer([Wanted(mask.node, reader) for mask in masks], self._scope)
        examples = Examples.of(self._scope, self._inputs)
        if not all(leaf in examples.values for leaf in part.leaves):
            raise Refused("its mask is computed from what is not known")
        given = [examples.values[leaf] for leaf in part.leaves]
        given = [one.clone() if isinstance(one, Tensor) else one for one in given]
        with torch.no_grad():
            tensors = Interpreter(part.graph_module()).run(*given)
        kept = torch.ones((1, 1), dtype=torch.bool, device=tensors[0].device)
        for mask, tensor in zip(masks, tensors, strict=True):
            keep = tensor > _HIDDEN if mask.role == "add" else tensor.bool()
            kept = kept & (~keep if mask.role == "drop" else keep)
            if kept.numel() > _MOST:
                raise Refused("its mask is too large to be looked at")
        return kept


def _share(kept: Tensor, causal: bool) -> float:
    if causal:
        kept = kept & torch.ones(kept.shape[-2:], dtype=torch.bool, device=kept.device).tril()
    rows, keys = kept.shape[-2:]
    padded = torch.nn.functional.pad(kept, (0, -keys % _BLOCK, 0, -rows % _BLOCK))
    *lead, rows, keys = padded.shape
    tiles = padded.reshape(*lead, rows // _BLOCK, _BLOCK, keys // _BLOCK, _BLOCK)
    held = tiles.any(-1).any(-2)
    return float(held.float().mean()) if held.numel() else 1.0


def _pays(trace: Trace, share: float, sharing: int, options: Options) -> bool:
    """Whether block-sparse kernels would be faster, were there nothing in their way."""
    assert trace.node is not None
    if share == 1.0:
        return False
    if options.decide == "sparse":
        return True
    target, work = Target.of(device_of(trace.node)), _work(trace)
    if work is None or (target.kind, work.trained) not in RATES:
        return False
    coverage = Coverage(share * work.n_kv, made=1 / sharing)
    as_it_is = dense(target, work)
    return cheapest([as_it_is, blocks(target, work, coverage)]) is not as_it_is


def _work(trace: Trace) -> Workload | None:
    """What there is to do, by the sizes of the scores; None where one is not known."""
    assert trace.node is not None
    if isinstance(trace.found, AttentionSite):
        q, k, v = (example_value(x.node) for x in (trace.site.q, trace.site.k, trace.site.v))
        shape, features = [*q.shape[:-1], k.shape[-2]], q.shape[-1] + v.shape[-1]
    else:
        keys = max(example_value(mask.node).shape[-1] for mask in trace.found.masks)
        shape, features = [*example_value(trace.node).shape[:-1], keys], _FEATURES
    numbers = [_hint(size) for size in (*shape, features)]
    sizes = [number for number in numbers if number is not None]
    if len(sizes) < len(numbers) or len(shape) < 2:
        return None
    *lead, n_q, n_kv, wide = sizes
    count = math.prod(lead)
    needs = example_value(trace.node).requires_grad
    trained, eager = torch.is_grad_enabled() and needs, _is_written_out(trace)
    return Workload(1, count, n_q, n_kv, wide, trained, eager)


def _is_written_out(trace: Trace) -> bool:
    return not isinstance(trace.found, AttentionSite) or trace.found.kind == "eager"


def _hint(size: Any) -> int | None:
    return size if isinstance(size, int) else size.node.hint


def warn_of(found: Sequence[Dense]) -> None:
    """One warning that names all of ``found`` that stand at places not told of in this process."""
    new = [one for one in found if _key(one.rejection) not in _TOLD]
    if not new:
        return
    _TOLD.update(_key(one.rejection) for one in new)
    count = f"{len(new)} attentions" if len(new) > 1 else "an attention"
    lines = [f"sparse_compile: {count} with a sparse mask will be computed densely:"]
    lines += _lines(new)
    lines.append(
        'warnings.simplefilter("ignore", sparse_compile.errors.StaysDense) silences this, and '
        "sparse_compile.explain(model, ...) tells of every attention."
    )
    warnings.warn("\n".join(lines), StaysDense, stacklevel=2)


def _key(rejection: Rejection) -> tuple[str, str]:
    return (rejection.where[-1] if rejection.where else ""), rejection.reason


def _lines(found: Sequence[Dense]) -> Iterator[str]:
    groups: dict[tuple[str, str], list[Dense]] = {}
    for one in found:
        groups.setdefault((one.rejection.reason, one.rejection.hint), []).append(one)
    for (reason, hint), alike in groups.items():
        for one in alike[:_SHOWN]:
            where = place(one.rejection.node, one.rejection.where)
            yield f"  {where} ({100 * one.share:.2g} % of the blocks hold an allowed pair)"
        if len(alike) > _SHOWN:
            yield f"  and {len(alike) - _SHOWN} more like these"
        yield f"    because {reason}."
        if hint:
            yield f"    To have it rewritten, {hint}."

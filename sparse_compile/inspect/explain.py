"""explain: capture a call with torch.compile, plan every graph, run it eagerly, and report.

Nothing is compiled. The call runs once, as it is, so that graphs after a break are seen too and the
densities are those of the real lengths and the real padding.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from sparse_compile.errors import SparseCompileError
from sparse_compile.inspect.diagnose import bad_attention
from sparse_compile.inspect.explain_selection import Selecting, pattern_tables, selected_in_call
from sparse_compile.inspect.readable import readable
from sparse_compile.inspect.report import Report, SiteReport
from sparse_compile.inspect.skipped import frames_skipped
from sparse_compile.layout import Layout, build_views
from sparse_compile.layout.schedule import workers_of
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.options import Options
from sparse_compile.passes import pipeline
from sparse_compile.passes.dense_tables import mask_data, selection_data, shown_predicate
from sparse_compile.passes.graph_edit import device_of, example_value, expected
from sparse_compile.selection import Selection, SelectionReport
from sparse_compile.sites.annotation import Annotation
from sparse_compile.sites.operands import Operand
from sparse_compile.sites.place import modules_around, place, readable_path
from sparse_compile.sites.plan import Plan, Trace
from sparse_compile.sites.site import AttentionSite, LiftedMask, Rejection
from sparse_compile.spec import AttentionSpec, KernelSpec
from sparse_compile.spec.target import Target

if TYPE_CHECKING:
    from sparse_compile.codegen.triton.short.spec import ShortKernelSpec

_NOTHING_SKIPPED = "in this call every block holds an allowed pair, so nothing is skipped"


def explain(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Report:
    """What ``torch.compile(model, backend="sparse_compile")`` does with the attention of a call.

    The model runs once, eagerly, in its own training mode and grad mode; the random number
    generators are left where they were.

    Args:
        model: a module or a function; a compiled one is looked through.
        *args: what it is called with.
        **kwargs: what it is called with. See :func:`explain_with` for options of the backend.
    """
    return explain_with()(model, *args, **kwargs)


def explain_with(options: Mapping[str, Any] | None = None) -> Callable[..., Report]:
    """:func:`explain` under the backend's ``options``: ``explain_with({...})(model, *args)``.

    Raises:
        UnknownOption, BadOption: as the backend does.
    """
    Options.parse(options)
    given = dict(options or {})

    def explain_call(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Report:
        with frames_skipped() as skipped:
            sites, graphs = examine(model, args, kwargs, given)
        reports = tuple(site.report() for site in sites)
        return Report(reports, graphs, () if graphs else tuple(skipped))

    return explain_call


@dataclass(frozen=True)
class Examined:
    """What became of one attention, with what the call that was explained had in its place.

    Attributes:
        trace: what the pipeline found out about it.
        shape: of the call; None if it is not known.
        tables: the tensors of the mask in this call; None if they are not known.
        sizes: the integers of the mask in this call.
        chosen: what is selected in this call; None where nothing is, or if it is not known.
        selecting: what a pattern selects it from; None as for ``chosen``.
    """

    trace: Trace
    shape: ProblemShape | None = None
    tables: tuple[Tensor, ...] | None = None
    sizes: tuple[int, ...] = ()
    chosen: Selection | None = None
    selecting: Selecting | None = None

    @property
    def plan(self) -> Plan | None:
        """What runs in its place; None for the program itself."""
        return self.trace.decision if isinstance(self.trace.decision, Plan) else None

    def report(self) -> SiteReport:
        """The site as users see it."""
        trace, plan = self.trace, self.trace.decided
        where, said = place(trace.node, trace.where), _said_of(trace.annotation, trace.node)
        costs = [way.cost for way in trace.proposals]
        ways = tuple(f"{c.name}: {c.refusal}" if c.refusal else c.shown for c in costs)
        is_left, mask = isinstance(plan, Rejection), _mask_of(trace)
        made = SiteReport(where, not is_left, plan.reason, mask=mask, annotation=said, ways=ways)
        if isinstance(plan, Rejection):
            return replace(made, hint=plan.hint)
        layout = self.layout()
        blocks, (views, cost) = _block_density(plan, layout), _views(plan)
        return replace(
            made,
            hint=_NOTHING_SKIPPED if blocks == 1.0 else "",
            density=None if layout is None or plan.selected else layout.density,
            block_density=blocks,
            executor=plan.executor,
            kernel=_kernel_name(plan, trace.target),
            views=views,
            cost=cost,
            utilisation=_utilisation(plan, layout),
            selection=None if plan.selected is None else plan.selected.shown,
            lists=self._lists(),
            score=_score(plan),
        )

    def _lists(self) -> SelectionReport | None:
        if self.chosen is None or self.shape is None:
            return None
        found = self.chosen.report(self.shape.n_q, self.shape.n_kv)
        lifted = None if self.plan is None else self.plan.lifted.selection
        # The room of lists says how many a top-k keeps, but nothing of a threshold.
        threshold = lifted is not None and lifted.waits is not None
        return replace(found, room=found.most) if threshold else found

    def layout(self) -> Layout | None:
        """The blocks that hold a pair of this call's mask; None if its values are not known.

        Where keys are selected, those of the static part; None without one.
        """
        plan = self.plan
        if plan is None or self.shape is None or self.tables is None:
            return None
        if plan.listed is not None or (plan.selected is not None and plan.selected.alone):
            return None  # its cost follows the lists of the call
        blocks, used = plan.spec.pieces[0]
        tables = [self.tables[number] for number in used]
        return build_views(blocks, self.shape, tables, self.sizes, device_of(plan.site.q.node))


def _said_of(annotation: Annotation | None, node: Node | None) -> str | None:
    """What the user's annotation says of a node, and on what it is; None without one."""
    if annotation is None:
        return None
    stack = modules_around(node)
    keys = [key for key in stack if key.split("@")[0] == str(annotation.module)]
    return annotation.shown(readable_path(stack[keys[-1]][0]) if keys else "")


def _mask_of(trace: Trace) -> str | None:
    """The mask in words, as what was decided reads it; None if it is not understood."""
    if not trace.readings:
        return None
    plan = trace.decision
    read = [r for r in trace.readings if isinstance(plan, Plan) and r.mask == plan.lifted]
    (reading, *_) = read or trace.readings
    static, chosen = readable(shown_predicate(reading.mask)), reading.selected
    if chosen is None:
        return static
    among = readable(shown_predicate(chosen.lifted))
    selected = "selected" if among == "true" else f"selected and {_in_parentheses(among)}"
    return selected if chosen.alone else f"{_in_parentheses(static)} or ({selected})"


def _in_parentheses(text: str) -> str:
    return f"({text})" if " or " in text else text


def _kernel_name(plan: Plan, target: Target | None) -> str | None:
    """Name of the kernel of the static part, if a kernel is generated for one."""
    alone = plan.selected is not None and plan.selected.alone
    assert target is not None
    return None if alone or plan.executor != "triton" else kernel_spec(plan, target.arch).name


def _block_density(plan: Plan, layout: Layout | None) -> float | None:
    # SDPA's dense kernels have blocks of their own.
    if layout is None or plan.selected or plan.executor == "sdpa" or 0 in (layout.n_q, layout.n_kv):
        return None
    return layout.block_density


def _views(plan: Plan) -> tuple[tuple[str, ...], str]:
    """The views of a plan in words, and why they were chosen, where there was a choice."""
    if plan.split is None or plan.executor == "sdpa":
        return (), ""
    return (() if plan.split.is_plain else plan.split.texts), plan.split.reason


def _utilisation(plan: Plan, layout: Layout | None) -> float | None:
    if layout is None or plan.executor != "triton":
        return None
    members = layout.batch * layout.heads
    return layout.utilisation(members, workers_of(device_of(plan.site.q.node)))


def kernel_spec(
    plan: Plan, arch: str, piece: AttentionSpec | None = None
) -> KernelSpec | ShortKernelSpec:
    """What determines the kernel of a piece of a plan, or its first, on ``"sm_90"`` and so on."""
    from sparse_compile.codegen.triton.short.spec import short_spec

    site, attention = plan.site, piece or plan.spec.pieces[0][0]
    dtype = str(example_value(site.output.node).dtype).removeprefix("torch.")
    dims = expected(site.q, "d"), expected(site.v, "d")
    if len(plan.spec.pieces) == 1:
        lengths, heads = ((expected(site.q, a), expected(site.k, a)) for a in ("n", "h"))
        short = short_spec(attention, lengths, heads, dims, dtype, arch)
        if short is not None:
            return short
    return KernelSpec(attention, *dims, dtype, arch)


#: A graph, and what became of its attentions.
_Run = tuple[GraphModule, tuple[Examined, ...]]
#: Where the graphs that run during one :func:`examine` report their values. Dynamo keeps a captured
#: graph for later calls with the same guards, so a graph must find the call it runs in by itself.
_RUNNING: ContextVar[list[_Run] | None] = ContextVar("_RUNNING", default=None)


def examine(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    target: Target | None = None,
) -> tuple[tuple[Examined, ...], int]:
    """What became of each attention of a call, with the call's values; and how many graphs it has.

    Args:
        model, args, kwargs: the call.
        options: of the backend.
        target: what to plan for; default what the tensors are on.
    """
    backend, given = _capturing(target), dict(options or {})
    compiled = torch.compile(_uncompiled(model), backend=backend, options=given)
    runs: list[_Run] = []
    token = _RUNNING.set(runs)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            compiled(*args, **kwargs)
    except Exception as error:
        ours = getattr(error, "inner_exception", None)  # what a backend raised, as torch wraps it
        if isinstance(ours, SparseCompileError):
            raise ours from None
        clearer = bad_attention(_uncompiled(model), args, kwargs)
        if clearer is None:
            raise
        raise clearer from error
    finally:
        _RUNNING.reset(token)
    first: dict[GraphModule, tuple[Examined, ...]] = {}
    for graph, sites in runs:
        first.setdefault(graph, sites)
    return tuple(site for sites in first.values() for site in sites), len(first)


def _uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model behind ``torch.compile(model)`` or ``model.compile()``."""
    model = getattr(model, "_orig_mod", model)
    if getattr(model, "_compiled_call_impl", None) is not None:
        model = copy.copy(model)  # shares parameters and buffers; a copy is not compiled
    return model


@functools.lru_cache(maxsize=16)
def _capturing(target: Target | None) -> Callable[..., Any]:
    """A backend that decides like ours and then runs the graph as it was.

    The same one for each target: Dynamo gives up on code that is compiled by one after another.
    """

    def capture(
        gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
    ) -> Callable[..., Any]:
        traces = pipeline.plan(gm, example_inputs, Options.parse(options), target)

        def run(*inputs: Any) -> Any:
            """Run the graph as it is, and note what its decisions read."""
            runs = _RUNNING.get()
            if runs is None:
                return gm(*inputs)
            values = _Values(gm, traces)
            result = values.run(*inputs)
            runs.append((gm, tuple(values.examined(trace) for trace in traces)))
            return result

        return run

    return capture


class _Values(Interpreter):
    """Runs a graph and keeps the shapes of attention operands and the leaves of masks."""

    def __init__(self, gm: GraphModule, traces: Sequence[Trace]) -> None:
        super().__init__(gm)
        plans = [trace.decision for trace in traces if isinstance(trace.decision, Plan)]
        self._read: set[Node] = set()
        for plan in plans:
            self._read.update(plan.lifted.leaves)
            if plan.selected is not None:
                self._read.update((plan.site.q.node, plan.site.k.node, *plan.selected.given))
            if plan.site.called is not None:
                self._read.update(n for n in plan.site.called.sizes if isinstance(n, Node))
        self._kept: dict[Node, Any] = {}
        self._shapes: dict[Node, tuple[int, ...]] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self._read:
            # The program may change it in place later on.
            self._kept[n] = value.detach().clone() if isinstance(value, Tensor) else value
        if isinstance(value, Tensor):
            self._shapes[n] = tuple(value.shape)
        return value

    def examined(self, trace: Trace) -> Examined:
        """What became of an attention, with what was kept for it."""
        plan = trace.decision
        if not isinstance(plan, Plan):
            return Examined(trace)
        shape, lifted = self._shape(plan.site), plan.lifted
        selecting = None
        tables, sizes, chosen = self._mask_data(lifted, shape)
        if plan.site.called is not None and tables is not None:
            of_call = plan.site.called.sizes
            sizes = tuple(self._kept[n] if isinstance(n, Node) else n for n in of_call)
        if tables is not None and shape is not None:
            tables = (*tables, *pattern_tables(lifted, shape, device_of(plan.site.q.node)))
            selecting = selected_in_call(plan, shape, tables, sizes, self._kept)
            chosen = chosen if selecting is None else selecting.found
        elif lifted.extra:
            tables = None
        return Examined(trace, shape, tables, sizes, chosen, selecting)

    def _mask_data(
        self, lifted: LiftedMask, shape: ProblemShape | None
    ) -> tuple[tuple[Tensor, ...] | None, tuple[int, ...], Selection | None]:
        if lifted.program is None:
            return (), (), None
        if shape is None or not all(leaf in self._kept for leaf in lifted.leaves):
            return None, (), None  # in the body of a higher-order call: its values are not seen
        with torch.no_grad():
            data = lifted.program(*(self._kept[leaf] for leaf in lifted.leaves))
        tables, sizes = mask_data(lifted, data, shape.n_q, shape.n_kv)
        return tuple(tables), tuple(sizes), selection_data(lifted, data)

    def _shape(self, site: AttentionSite) -> ProblemShape | None:
        q, kv = self._sizes(site.q), self._sizes(site.k)["n"]
        shape = ProblemShape(q.get("b", 1), q.get("h", 1), q["n"], kv)
        return shape if all(isinstance(size, int) for size in shape) else None

    def _sizes(self, operand: Operand) -> dict[str, Any]:
        shape = self._shapes.get(operand.node, example_value(operand.node).shape)
        return dict(zip(operand.axes, shape, strict=True))


def _score(plan: Plan) -> str | None:
    """Scores that are not the scaled products ``score`` of q and k, in words."""
    program, learned = plan.lifted.score, plan.lifted.learned
    parts = [] if program is None else [str(program)]
    shown = () if learned is None else enumerate(learned.shown)
    parts += [f"w{number} is {text}" for number, text in shown]
    parts += ["and a sink beside the keys"] if plan.site.sinks else []
    return ", ".join(parts) or None

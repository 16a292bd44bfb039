"""lift_mask: slice, normalise, lift, judge empty rows, make tables, verify."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from sparse_compile.expr import KV, N_KV, N_Q, B, H, MaskExpr, Q, size_symbol
from sparse_compile.options import Options
from sparse_compile.passes.graph_edit import first_reader
from sparse_compile.passes.lift.empty_rows import (
    beside_a_program,
    coordinate_ranges,
    empty_row_policy,
    never_empty,
)
from sparse_compile.passes.lift.expose import expose
from sparse_compile.passes.lift.kept import Kept, split_kept
from sparse_compile.passes.lift.lift import Lifter
from sparse_compile.passes.lift.normalize import normalise
from sparse_compile.passes.lift.operands import Keep, Refused, read_operand
from sparse_compile.passes.lift.rankings import (
    Bound,
    bound_of,
    is_topk_index,
    is_topk_values,
    ranking_of,
    topk_dim,
    topk_of,
)
from sparse_compile.passes.lift.rows import NotSelected
from sparse_compile.passes.lift.selected import (
    check_heads,
    made_of,
    split_selection,
    uncast,
)
from sparse_compile.passes.lift.simplify import Simplifier
from sparse_compile.passes.lift.sizes import size_expr, solve_for_symbol
from sparse_compile.passes.lift.slice import (
    CannotSlice,
    Slice,
    Slicer,
    Wanted,
)
from sparse_compile.passes.lift.tables import Selects, Tabler, build_program
from sparse_compile.passes.lift.value import Lifted, Unliftable
from sparse_compile.passes.lift.verify import Check, Examples, verify
from sparse_compile.sites.site import (
    AttentionSite,
    DenseTable,
    LiftedMask,
    Operand,
    Reached,
    Rejection,
    Scope,
    SelectedKeys,
)
from sparse_compile.spec import EmptyRows

Lengths = Mapping[sympy.Symbol, sympy.Expr]


@dataclass
class LiftCache:
    """Work shared by the sites of one backend call: layers usually share one mask."""

    slicer: Slicer = field(default_factory=Slicer)
    traced: dict[Any, tuple[GraphModule, Lifter]] = field(default_factory=dict)
    lifted: dict[Any, LiftedMask | Refused] = field(default_factory=dict)


def lift_mask(
    site: AttentionSite,
    example_inputs: Sequence[Any],
    options: Options,
    cache: LiftCache,
) -> LiftedMask | Rejection:
    """The meaning of a site's masks as one predicate, with all that can be said otherwise.

    Args:
        site: the attention.
        example_inputs: the captured graph's inputs, as Dynamo passes them to a backend.
        options: ``finite_fill`` and ``verify_bytes`` matter here.
        cache: shared by the sites of one backend call.
    """
    try:
        if not site.masks:
            return LiftedMask(MaskExpr(sympy.Le(KV, Q) if site.causal else sympy.true))
        work = _Work.of(site, cache)
        key = (work.key, options.finite_fill)
        if key not in cache.lifted:
            cache.lifted[key] = _attempt(work, example_inputs, options, cache)
        lifted = cache.lifted[key]
        if isinstance(lifted, Refused):
            raise lifted
        return lifted
    except CannotSlice as error:
        return Rejection(str(error), error.hint, site.where, site.output.node)
    except Refused as refused:
        return Rejection(refused.reason, refused.hint, site.where, site.output.node)
    except Exception as error:  # A mistake of ours must not stop the user's program: it is told.
        reason = f"internal error while reading its mask: {type(error).__name__}: {error}"
        return Rejection(reason, "please report this mask", site.where, site.output.node)


def _attempt(
    work: _Work, example_inputs: Sequence[Any], options: Options, cache: LiftCache
) -> LiftedMask | Refused:
    try:
        return _lift(work, example_inputs, options, cache)
    except Refused as refused:
        return Refused(refused.reason, _float_hint(work.part) or refused.hint)
    except CannotSlice as error:
        return Refused(str(error), error.hint)


def _float_hint(part: Slice) -> str:
    """What helps when torch.compile made a Python float of the mask a run-time value."""
    values = (node.meta.get("example_value") for node in (*part.leaves, *part.nodes))
    if any(isinstance(value, torch.SymFloat) for value in values):
        return "set torch._dynamo.config.specialize_float = True: the mask reads a Python float"
    return ""


@dataclass(frozen=True)
class _Work:
    """What a site asks for, with what is the same for sites that share a mask made equal.

    Attributes:
        site: one of the sites.
        part: the slice that computes the operands, then the fills that are nodes.
        lengths: number of batch entries, heads, queries and keys, in torch's size symbols.
        dtype: of the scores when they are masked.
    """

    site: AttentionSite
    part: Slice
    lengths: Lengths
    dtype: torch.dtype

    @staticmethod
    def of(site: AttentionSite, cache: LiftCache) -> _Work:
        wanted = [Wanted(mask.node, first_reader(site, mask.node)) for mask in site.masks]
        wanted += [
            Wanted(mask.fill, first_reader(site, mask.fill))
            for mask in site.masks
            if isinstance(mask.fill, Node)
        ]
        part = cache.slicer(wanted, site.scope)
        return _Work(site, part, _lengths(site), _score_dtype(site))

    @property
    def key(self) -> Any:
        site = self.site
        roles = tuple((mask.role, mask.fill) for mask in site.masks)
        scores = (site.score is None, site.sinks is None, _need_gradients(site))
        ranked = site.ranked is None
        plan = (site.kind, site.causal, site.score_axes, self.dtype, ranked, scores)
        return (self.part.nodes, self.part.outputs, roles, plan, tuple(self.lengths.items()))

    @property
    def trace_key(self) -> Any:
        return (self.part.nodes, self.part.leaves, self.part.outputs)


def _score_dtype(site: AttentionSite) -> torch.dtype:
    first = site.masks[0].node
    reader = first_reader(site, first)
    value = reader.meta.get("example_value")
    if site.kind == "eager" and isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.dtype
    dtype: torch.dtype = site.q.node.meta["example_value"].dtype
    return dtype


def _need_gradients(site: AttentionSite) -> bool:
    """Whether autograd follows the scores when they are masked."""
    value = first_reader(site, site.masks[0].node).meta.get("example_value")
    return not isinstance(value, torch.Tensor) or value.requires_grad


def _size(operand: Operand, axis: str) -> sympy.Expr:
    if axis not in operand.axes:
        return sympy.S.One
    return size_expr(operand.node.meta["example_value"].shape[operand.axes.index(axis)])


def _lengths(site: AttentionSite) -> Lengths:
    """Sizes of the coordinates, preferring a mask's own symbols: layers may differ in theirs."""
    sizes = {"b": _size(site.q, "b"), "h": _size(site.q, "h")}
    sizes |= {"q": _size(site.q, "n"), "kv": _size(site.k, "n")}
    for mask in reversed(site.masks):
        shape = mask.node.meta["example_value"].shape
        for axis, size in zip(reversed(site.score_axes), reversed(shape), strict=False):
            if size_expr(size) != 1:
                sizes[axis] = size_expr(size)
    symbols = {"b": B, "h": H, "q": Q, "kv": KV}
    return {symbols[axis]: size for axis, size in sizes.items()}


def _lift(
    work: _Work, example_inputs: Sequence[Any], options: Options, cache: LiftCache
) -> LiftedMask:
    if work.trace_key not in cache.traced:
        traced = normalise(work.part)
        inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
        pairs = zip(inputs, work.part.leaves, strict=True)
        expose(traced, {node: topk_dim(leaf) for node, leaf in pairs if is_topk_index(leaf)})
        cache.traced[work.trace_key] = (traced, Lifter(traced))
    traced, lifter = cache.traced[work.trace_key]
    # Tracing may have fixed a size, as when a slice is compared with the length it is cut from.
    work = replace(work, lengths=_lengths(work.site))
    keeps = _keeps(work, traced, lifter)
    simplify = Simplifier(coordinate_ranges(work.lengths))
    conditions = [keep.condition for keep in keeps]
    conditions += [sympy.Le(KV, Q)] if work.site.causal else []
    predicate = simplify(sympy.And(*(simplify(condition) for condition in conditions)))
    # With a sink, a row without keys gives all its weight to that, and yields 0.
    sunk = work.site.sinks is not None
    can_be_empty = not sunk and not never_empty(predicate, work.lengths, simplify)
    policy = (
        EmptyRows.ZERO
        if work.site.kind == "call"
        else empty_row_policy(
            work.site.kind, work.site.causal, keeps, work.dtype, can_be_empty, options.finite_fill
        )
    )
    if work.site.score is not None:
        need = _need_gradients(work.site)
        policy = beside_a_program(policy, need, options.finite_fill)
    fills = [keep.fills for keep in keeps]
    check = _check(work, fills)
    examples = Examples.of(work.site.scope, example_inputs)

    def checked(lifted: LiftedMask) -> LiftedMask:
        lifted = replace(lifted, empty_rows=policy, fills=tuple(itertools.chain(*fills)))
        visited = verify(check, lifted, examples, options.verify_bytes, cache.slicer)
        return replace(lifted, visited=visited)

    lifted = checked(_with_selection(work, traced, lifter, predicate, simplify))
    selection = lifted.selection
    if selection is None or selection.waits is None or work.site.ranked is not None:
        return lifted
    otherwise: LiftedMask | Rejection
    try:
        otherwise = checked(_tabled(work, traced, lifter, predicate, simplify))
    except Refused as refused:
        otherwise = Rejection(refused.reason, refused.hint)
    return replace(lifted, otherwise=otherwise)


def _check(work: _Work, fills: list[tuple[float, ...]]) -> Check:
    """What the program's own masks are compared with."""
    site = work.site
    wanted = [Wanted(mask.node, first_reader(site, mask.node)) for mask in site.masks]
    axes, causal = site.score_axes, site.causal
    return Check(*(site.scope, work.part, wanted, site.masks, fills, axes, causal, work.lengths))


def _keeps(work: _Work, traced: GraphModule, lifter: Lifter) -> list[Keep]:
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    tensors = [_read(lifter, node) for node in output.args[0]]
    fills = iter(tensors[len(work.site.masks) :])
    keeps = []
    for mask, tensor in zip(work.site.masks, tensors, strict=False):
        fill = next(fills) if isinstance(mask.fill, Node) else None
        keeps.append(read_operand(mask, tensor, fill, work.site.score_axes))
    return keeps


def _read(lifter: Lifter, node: Node) -> Lifted:
    try:
        return lifter.tensor(node)
    except Unliftable as error:
        raise Refused(f"its mask is not understood: {error}") from error


def _with_selection(
    work: _Work,
    traced: GraphModule,
    lifter: Lifter,
    predicate: sympy.Basic,
    simplify: Simplifier,
) -> LiftedMask:
    """The predicate over tables; what an index selects is apart from it, where lists can say it."""
    try:
        chosen: Selects | None
        rest, chosen = split_selection(predicate, lifter, work.lengths)
        if chosen is None:
            bounds = _bounds(work, traced)
            rest, chosen = split_kept(predicate, lifter, work.lengths, bounds)
        if chosen is not None:
            check_heads(chosen.lists, _size(work.site.k, "h"))
    except NotSelected as error:
        lifted = _tabled(work, traced, lifter, predicate, simplify)
        return replace(lifted, unselected=str(error))
    return _tabled(work, traced, lifter, rest, simplify, chosen)


def _bounds(work: _Work, traced: GraphModule) -> dict[Node, Bound]:
    """The inputs of a traced mask that are results of a ranking."""
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    pairs = zip(inputs, work.part.leaves, strict=True)
    return {node: bound_of(ranked) for node, leaf in pairs if (ranked := ranking_of(leaf))}


def _tabled(
    work: _Work,
    traced: GraphModule,
    lifter: Lifter,
    predicate: sympy.Basic,
    simplify: Simplifier,
    chosen: Selects | None = None,
) -> LiftedMask:
    """The predicate with run-time data as tables and sizes, and the program that computes them."""
    tabled = Tabler(same_length=work.lengths[Q] == work.lengths[KV])(predicate)
    named, sizes = _named_sizes(simplify(tabled.predicate), work.lengths)
    if not tabled.contents and not tabled.dense and not sizes and chosen is None:
        return LiftedMask(MaskExpr(named))
    holders = _size_holders(work.part.scope)
    extra = [s for s in holders if holders[s] not in work.part.leaves]
    try:
        program = build_program(traced, lifter, tabled, sizes, work.lengths, extra, named, chosen)
    except Unliftable as error:
        raise Refused(f"its mask is not understood: {error}") from error
    given = work.part.leaves
    leaves = tuple(given[n] if n >= 0 else holders[extra[-1 - n]] for n in program.origins)
    dense = tuple(DenseTable(axes, _shown(axes, work.lengths)) for axes in program.dense)
    mask = MaskExpr(named, (*program.dtypes, *["int32"] * len(dense)), len(sizes))
    scope = work.part.scope
    selection = None if chosen is None else _selection(chosen, traced, given)
    return LiftedMask(
        mask,
        program=program.module,
        leaves=leaves,
        scope=scope,
        dense=dense,
        selection=selection,
    )


def _selection(chosen: Selects, traced: GraphModule, leaves: Sequence[Node]) -> SelectedKeys:
    """What a selection is, and the top-k that it comes from, if one."""
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    start = chosen.node if isinstance(chosen, Kept) else uncast(chosen.index)
    read = [leaves[inputs.index(node)] for node in made_of(start) if node in inputs]
    best = tuple(dict.fromkeys(topk for leaf in read if (topk := topk_of(leaf)) is not None))
    units = chosen.rows.unit_q, chosen.rows.unit_kv
    if isinstance(chosen, Kept):
        row, reached = chosen.reached, None
        if row is not None and is_topk_values(leaf := leaves[inputs.index(row.values)]):
            reached = Reached(leaf, row.comparison, row.least)
        return SelectedKeys(*units, f"{chosen.most}", None, best, not chosen.fixed, reached)
    found = leaves[inputs.index(start)] if start in inputs else None
    source = found if found is not None and is_topk_index(found) else None
    return SelectedKeys(*units, f"{chosen.most}", source, best)


def _shown(axes: Sequence[str], lengths: Lengths) -> str:
    """A mask tensor in words."""
    sizes = [lengths[c] if c.name in axes else sympy.S.One for c in (B, H, Q, KV)]
    return f"tensor [{', '.join(map(str, sizes))}]"


def _named_sizes(
    predicate: sympy.Basic, lengths: Lengths
) -> tuple[sympy.Basic, tuple[sympy.Symbol, ...]]:
    """The predicate with n_q and n_kv, and s0, s1, ... for the other sizes, which are returned."""
    names: dict[sympy.Basic, sympy.Expr] = {}
    for coordinate, length in ((KV, N_KV), (Q, N_Q)):
        solved = solve_for_symbol(lengths[coordinate], length)
        if solved is not None:
            names.setdefault(*solved)
    known = {B, H, Q, KV}
    rest = sorted((s for s in predicate.free_symbols if s not in known | names.keys()), key=str)
    names |= {symbol: size_symbol(number) for number, symbol in enumerate(rest)}
    return predicate.xreplace(names), tuple(rest)


def _size_holders(scope: Scope) -> dict[sympy.Symbol, Node]:
    """The inputs of the captured graph that hold a size symbol."""
    while scope.parent is not None:
        scope = scope.parent
    found: dict[sympy.Symbol, Node] = {}
    for node in scope.gm.graph.nodes:
        value = node.meta.get("example_value")
        if node.op == "placeholder" and isinstance(value, torch.SymInt):
            expr = size_expr(value)
            if expr.is_Symbol:
                found.setdefault(expr, node)
    return found

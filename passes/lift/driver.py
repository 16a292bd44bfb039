"""lift_mask: slice, normalise, lift, judge empty rows, make tables, verify."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from sparse_compile.expr import (
    KV,
    N_KV,
    N_Q,
    B,
    H,
    MaskExpr,
    Q,
    size_symbol,
)
from sparse_compile.options import Options
from sparse_compile.passes.graph_edit import dimension
from sparse_compile.passes.lift.biases import Bias, Biases, check_sizes, contributions
from sparse_compile.passes.lift.bounds import Ranges
from sparse_compile.passes.lift.data_masks import is_kept, with_hidden
from sparse_compile.passes.lift.emit import Emitter
from sparse_compile.passes.lift.empty_rows import LARGEST_ASSUMED, Level, of_empty_rows
from sparse_compile.passes.lift.examples import Examples
from sparse_compile.passes.lift.expose import expose
from sparse_compile.passes.lift.kept import Kept, is_topk_index, split_kept, topk_dim, topk_of
from sparse_compile.passes.lift.lift import Lifter
from sparse_compile.passes.lift.masks import Keep, Lengths, SiteMasks, is_trained, read_operand
from sparse_compile.passes.lift.normalize import normalise
from sparse_compile.passes.lift.selected import NotSelected, check_heads, split_selection, uncast
from sparse_compile.passes.lift.simplify import Simplifier
from sparse_compile.passes.lift.slice import Slice, Slicer, call_name, made_of
from sparse_compile.passes.lift.tables import Selects, Tabler, with_program
from sparse_compile.passes.lift.value import size_expr, solve_for_symbol
from sparse_compile.passes.lift.verify import Question, verify
from sparse_compile.sites.operands import Scope
from sparse_compile.sites.site import AttentionSite, LiftedMask, Refused, Rejection, SelectedKeys
from sparse_compile.spec import EmptyRows


@dataclass
class LiftCache:
    """Work shared by the sites of one backend call: layers usually share one mask."""

    slicer: Slicer = field(default_factory=Slicer)
    traced: dict[Any, Lifter] = field(default_factory=dict)
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
    found: LiftedMask | Refused
    try:
        if not site.masks:
            own = MaskExpr(sympy.Le(KV, Q) if site.causal else sympy.true)
            return LiftedMask(own, score=site.score)
        masks = SiteMasks.of(site, cache.slicer)
        key = (masks.key, options.finite_fill)
        if key not in cache.lifted:
            cache.lifted[key] = _attempt(masks, example_inputs, options, cache)
        found = cache.lifted[key]
    except Refused as refused:
        found = refused
    except Exception as error:  # A mistake of ours must not stop the user's program: it is told.
        reason = f"internal error while reading its mask: {type(error).__name__}: {error}"
        found = Refused(reason, "please report this mask")
    if isinstance(found, Refused):
        return found.at(site.where, site.output.node)
    return found


def _attempt(
    masks: SiteMasks, example_inputs: Sequence[Any], options: Options, cache: LiftCache
) -> LiftedMask | Refused:
    try:
        return _lift(masks, example_inputs, options, cache)
    except Refused as refused:
        part, hint = masks.part, refused.hint
        values = (node.meta.get("example_value") for node in (*part.leaves, *part.nodes))
        # torch.compile made a Python float of the mask a run-time value.
        if any(isinstance(value, torch.SymFloat) for value in values):
            hint = "set torch._dynamo.config.specialize_float = True: the mask reads a Python float"
        return Refused(refused.reason, hint)


@dataclass(frozen=True)
class _Reading:
    """The masks of a site, read.

    Attributes:
        masks: what was asked.
        lifter: of the traced graph that computes them.
        simplify: in the ranges of the coordinates.
        predicate: what they say, over run-time data.
    """

    masks: SiteMasks
    lifter: Lifter
    simplify: Simplifier
    predicate: sympy.Basic


def _lift(
    masks: SiteMasks, example_inputs: Sequence[Any], options: Options, cache: LiftCache
) -> LiftedMask:
    part, site = masks.part, masks.site
    nodes = (part.nodes, part.leaves, part.outputs)
    if nodes not in cache.traced:
        cache.traced[nodes] = _lifter(part)
    lifter, masks = cache.traced[nodes], masks.traced()
    examples = Examples.of(site.scope, example_inputs)
    keeps = _with_data(masks, lifter, _keeps(masks, lifter, options), examples)
    simplify = Simplifier(Ranges({symbol: n - 1 for symbol, n in masks.lengths.items()}))
    conditions = [keep.condition for keep in keeps]
    conditions += [sympy.Le(KV, Q)] if site.causal else []
    predicate = simplify(sympy.And(*(simplify(condition) for condition in conditions)))
    biases = _biases(masks, lifter, keeps)
    program = biases.program()
    trained = [one for one in biases.found if is_trained(site.masks[one.mark])]
    linear = (program is None or program.derivative == 1) and not trained
    empty = of_empty_rows(masks, keeps, predicate, simplify, options.finite_fill, linear)
    # Rows of -inf that a buffer may hold one day are NaN all the same, with all but this gradient.
    known = not any(keep.data for keep in keeps)
    reached = not all(_is_chosen(masks, one) for one in trained)
    if empty.policy is EmptyRows.NAN_ADDED and known and reached:
        raise Refused(
            "rows may be fully masked by adding -inf: then what is trained beside has gradients of "
            "NaN, which are not followed",
            "use masked_fill or torch.where with float('-inf')",
        )
    if empty.levels and any(one.cases for one in trained):
        # What is hidden may have been chosen by `where`, and then gets no gradient.
        biases = _biases(masks, lifter, keeps, direct=True)
        program = biases.program()
    check_sizes(program)
    fills = tuple(fill for keep in keeps for fill in keep.fills)
    learned = biases.computed()
    _check_finite(masks, lifter, keeps, examples)
    reading = _Reading(masks, lifter, simplify, predicate)
    fallbacks = tuple(_fallback(reading, level, biases) for level in empty.levels)
    if fallbacks:
        fallbacks = (*fallbacks[:-1], replace(fallbacks[-1], empty_rows=empty.policy))
    policy = EmptyRows.ZERO if fallbacks else empty.policy

    def checked(lifted: LiftedMask) -> LiftedMask:
        lifted = replace(lifted, empty_rows=policy, fills=fills, score=program, learned=learned)
        lifted = replace(lifted, fallbacks=fallbacks)
        ways = [[state.fills for state in level.states] for level in empty.levels]
        asked = Question(masks, keeps, tuple(biases.found), lifted, examples, ways)
        visited = verify(asked, options.verify_bytes, cache.slicer)
        return replace(lifted, visited=visited)

    lifted = checked(_with_selection(reading))
    selection = lifted.selection
    if selection is None or selection.waits is None or site.ranked is not None:
        return lifted
    otherwise: LiftedMask | Rejection
    try:
        otherwise = checked(_tabled(reading, predicate))
    except Refused as refused:
        otherwise = refused.at()
    return replace(lifted, otherwise=otherwise)


def _lifter(part: Slice) -> Lifter:
    traced = normalise(part)
    inputs = zip(traced.graph.find_nodes(op="placeholder"), part.leaves, strict=True)
    expose(traced, {node: topk_dim(leaf) for node, leaf in inputs if is_topk_index(leaf)})
    return Lifter(traced, part.leaves)


def _suspects(masks: SiteMasks, lifter: Lifter, mark: int, examples: Examples) -> list[Node]:
    """Inputs that a bias is read from, and that may as well hold a mask: -inf, or what absorbs."""
    lengths = {examples.size(masks.lengths[KV])} - {1}
    leaves = _leaves(lifter, mark)
    return [leaf for leaf in leaves if _may_hold_mask(examples.value_of(leaf), lengths)]


def _leaves(lifter: Lifter, mark: int) -> list[Node]:
    """The inputs that an operand is computed of."""
    read = made_of(lifter.outputs[mark])
    return [lifter.leaves[node] for node in read if node in lifter.leaves]


def _with_data(
    masks: SiteMasks, lifter: Lifter, keeps: Sequence[Keep], examples: Examples
) -> list[Keep]:
    """What operands do, some of which read a mask in floating numbers beside a bias."""
    found = list(keeps)
    for mark, keep in enumerate(keeps):
        suspects = _suspects(masks, lifter, mark, examples) if keep.bias is not None else []
        if suspects and all(map(is_kept, suspects)):
            found[mark] = with_hidden(masks, lifter, mark, keep)
    return found


def _check_finite(
    masks: SiteMasks, lifter: Lifter, keeps: Sequence[Keep], examples: Examples
) -> None:
    """That no bias is read from an input that may as well hold a mask.

    What a row yields that has nothing else depends on these numbers, which only a call has.
    """
    biases = [mark for mark, keep in enumerate(keeps) if keep.bias is not None and not keep.data]
    read = [leaf for mark in biases for leaf in _leaves(lifter, mark)]
    if any(_hides(examples.value_of(leaf)) for leaf in read):
        raise Refused(
            "it adds a parameter that hides keys with -inf or numbers as low: what it holds is "
            "only known at run time",
            "keep what it hides in a bool buffer, True to attend, and pass that as attn_mask "
            'or write masked_fill(~allowed, float("-inf"))',
        )
    if any(_suspects(masks, lifter, mark, examples) for mark in biases):
        raise Refused(
            "it adds a bias that is not a mask: its values are only known at run time",
            "pass a bool mask if it only says who may attend to whom, make it a parameter if it is "
            "a bias, or promise what it is: sparse_compile.mask(module, pattern, promise=True)",
        )


def _may_hold_mask(value: Any, lengths: Container[int]) -> bool:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.dim():
        return False
    return value.shape[-1] in lengths and not _is_bias(value)


def _is_bias(value: torch.Tensor) -> bool:
    return value.requires_grad or isinstance(value, torch.nn.Parameter)


def _hides(value: Any) -> bool:
    """Whether a parameter of the example holds numbers that no bias has."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter):  # no tensor, or a fake one
        return False
    real = value.is_floating_point() and _is_bias(value)
    return real and not bool((value.detach() > LARGEST_ASSUMED).all())


def _is_chosen(masks: SiteMasks, bias: Bias) -> bool:
    """Whether `where` or `masked_fill` chooses between a bias and -inf: no NaN reaches it then."""
    return call_name(masks.site.masks[bias.mark].node) in ("where", "masked_fill")


def _biases(
    masks: SiteMasks, lifter: Lifter, keeps: Sequence[Keep], direct: bool = False
) -> Biases:
    """What the operands of the scores do beside masking."""
    emitter = Emitter(lifter, masks.lengths, _size_holders(masks.part.scope))
    biases = Biases(masks, lifter, emitter, direct)
    for mark, operand, cases in contributions(masks, keeps):
        biases.add(mark, operand, cases)
    if biases.found and masks.site.ranked is not None:
        raise Refused(*masks.site.ranked)
    return biases


def _keeps(masks: SiteMasks, lifter: Lifter, options: Options) -> list[Keep]:
    assumed = LARGEST_ASSUMED if options.finite_fill == "minus_inf" else -math.inf
    site, tensors = masks.site, [lifter.tensor(node) for node in lifter.outputs]
    fills = iter(tensors[len(site.masks) :])
    keeps = []
    for mask, tensor in zip(site.masks, tensors, strict=False):
        fill = next(fills) if isinstance(mask.fill, Node) else None
        keeps.append(read_operand(mask, tensor, fill, masks, assumed))
    return keeps


def _with_selection(reading: _Reading) -> LiftedMask:
    """The predicate over tables; what an index selects is apart from it, where lists can say it."""
    given = reading.predicate, reading.lifter, reading.masks.lengths
    chosen: Selects | None
    try:
        rest, chosen = split_selection(*given)
        if chosen is None:
            rest, chosen = split_kept(*given)
        if chosen is not None:
            check_heads(chosen.lists, size_expr(dimension(reading.masks.site.k, "h")))
    except NotSelected as error:
        return replace(_tabled(reading, reading.predicate), unselected=str(error))
    return _tabled(reading, rest, chosen)


def _tabled(reading: _Reading, predicate: sympy.Basic, chosen: Selects | None = None) -> LiftedMask:
    """The predicate with run-time data as tables and sizes, and the program that computes them."""
    lifted, _ = _tabled_with(reading, predicate, (), chosen)
    return lifted


def _tabled_with(
    reading: _Reading,
    predicate: sympy.Basic,
    conditions: Sequence[sympy.Basic],
    chosen: Selects | None = None,
) -> tuple[LiftedMask, Sequence[sympy.Basic]]:
    """The same, and further conditions over its tables and sizes."""
    masks, lifter = reading.masks, reading.lifter
    lengths, scope = masks.lengths, masks.part.scope
    tabled = Tabler(same_length=lengths[Q] == lengths[KV])(predicate, *conditions)
    spelled = [reading.simplify(one) for one in (tabled.predicate, *tabled.others)]
    (named, *others), sizes = _named_sizes(spelled, lengths)
    if not tabled.contents and not tabled.dense and not sizes and chosen is None:
        return LiftedMask(MaskExpr(named)), others
    emitter = Emitter(lifter, lengths, _size_holders(scope))
    lifted = with_program(emitter, tabled, named, sizes, chosen)
    selection = None if chosen is None else _selection(chosen, lifter)
    return replace(lifted, scope=scope, selection=selection), others


def _fallback(reading: _Reading, level: Level, biases: Biases) -> LiftedMask:
    """What a query without keys attends to, with scores that count alike."""
    *cases, (last, _) = level.values
    lifted, conditions = _tabled_with(reading, level.condition, [where for _, where in cases])
    masks = reading.masks
    if lifted.dense and not all(
        masks.memory.stays(node, masks.wanted[0].reader, masks.site.output.node)
        for node in lifted.leaves
        if node.graph is masks.site.output.node.graph
    ):
        raise Refused(
            "rows may be fully masked, and its mask tensor is changed in place before they are "
            "attended to",
            "change it after the attention",
        )
    value = last
    for (other, _), where in zip(reversed(cases), reversed(conditions), strict=True):
        value = sympy.Piecewise((other, where), (value, True))
    return replace(lifted, score=replace(biases.program_of(value), absorbed=True))


def _selection(chosen: Selects, lifter: Lifter) -> SelectedKeys:
    """What a selection is, and the top-k that it comes from, if one."""
    leaves = lifter.leaves
    start = chosen.node if isinstance(chosen, Kept) else uncast(chosen.node)
    read = [leaves[node] for node in made_of(start) if node in leaves]
    best = tuple(dict.fromkeys(topk for leaf in read if (topk := topk_of(leaf)) is not None))
    units = chosen.rows.unit_q, chosen.rows.unit_kv
    if isinstance(chosen, Kept):
        waits, reached = not chosen.fixed, chosen.reached
        return SelectedKeys(*units, f"{chosen.most}", None, best, waits, reached)
    found = leaves.get(start)
    source = found if found is not None and is_topk_index(found) else None
    return SelectedKeys(*units, f"{chosen.most}", source, best)


def _named_sizes(
    conditions: Sequence[sympy.Basic], lengths: Lengths
) -> tuple[list[sympy.Basic], tuple[sympy.Symbol, ...]]:
    """Conditions with n_q and n_kv, and s0, s1, ... for the other sizes, which are returned."""
    names: dict[sympy.Basic, sympy.Expr] = {}
    for coordinate, length in ((KV, N_KV), (Q, N_Q)):
        solved = solve_for_symbol(lengths[coordinate], length)
        if solved is not None:
            names.setdefault(*solved)
    known = {B, H, Q, KV}
    found = {symbol for condition in conditions for symbol in condition.free_symbols}
    rest = sorted(found - known - names.keys(), key=str)
    names |= {symbol: size_symbol(number) for number, symbol in enumerate(rest)}
    return [condition.xreplace(names) for condition in conditions], tuple(rest)


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

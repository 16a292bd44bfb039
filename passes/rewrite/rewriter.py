"""rewrite: put the planned operators in the place of the attention they compute."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch.fx import Node

from sparse_compile import ops
from sparse_compile.expr import B, H, MaskExpr, Q
from sparse_compile.expr import table as lookup_of
from sparse_compile.layout.from_dense import DenseRead
from sparse_compile.ops import pattern as pattern_ops
from sparse_compile.ops.selection import CANONICAL_SELECTION, SELECT
from sparse_compile.passes.dense_tables import dense_reads
from sparse_compile.passes.graph_edit import (
    CANONICAL,
    Inserter,
    device_of,
    dimension,
    example_value,
    first_reader,
    with_axes,
)
from sparse_compile.passes.rewrite.asserts import drop_asserts
from sparse_compile.passes.rewrite.indexer import replace_indexer, replace_lists
from sparse_compile.passes.rewrite.results import ruined, with_sinks, without_nan
from sparse_compile.passes.rewrite.tables import RealisedTables, compute, realise
from sparse_compile.sites.named import INDEX, LISTS
from sparse_compile.sites.operands import Operand
from sparse_compile.sites.plan import Indexer, Plan
from sparse_compile.sites.site import AttentionSite, BlockScoresSite, LiftedMask, PatternTable
from sparse_compile.spec import AttentionSpec, EmptyRows

_CANONICAL = "bhnd"


#: Tables and sizes of a mask.
_Data = tuple[list[Node], list[int | Node]]


class Rewriter:
    """Rewrites the sites of one captured graph; those that share a mask share its data.

    The nodes that computed the old attention are left for AOTAutograd, which removes what is dead
    and knows which mutations are visible from outside.
    """

    def __init__(self, check_promises: bool = False) -> None:
        self._check_promises = check_promises
        self._tables = RealisedTables()
        self._made: dict[tuple[Any, ...], Node] = {}
        self._layouts: dict[tuple[Any, ...], list[Node]] = {}
        self._replaced: dict[Node, Node] = {}
        self._indexers: dict[Node, Indexer] = {}
        self._lists: dict[tuple[Node, ...], Indexer] = {}

    def apply(self, plan: Plan) -> None:
        """Replace one site."""
        site = self._current(plan.site)
        plan = replace(plan, site=site)
        insert = Inserter(site.scope.gm, site.output.node)
        q, k, v = (self._operand(insert, site, operand) for operand in (site.q, site.k, site.v))
        q, scale = _scale(insert, site, q)
        if self._check_promises:
            q = _checked(insert, site, q, k)
        if plan.executor == "sdpa":
            out = _call_sdpa(insert, plan, q, k, v, scale)
        else:
            tables, sizes, lists = self._mask_data(insert, plan, q, k)
            data = tables, sizes, lists, scale, plan.spec.text
            learned = compute(plan.lifted.learned, site.scope, self._tables)
            learned += _seed(insert, site)
            call = insert.call(ops.ATTENTION, q, k, v, learned, *data)
            out = insert.call(operator.getitem, call, 0)
            if plan.lifted.fallbacks:
                lse = insert.call(operator.getitem, call, 1)
                out = self._fall_back(insert, plan, (q, k, v), (learned, scale), out, lse)
            if site.zeroed in ("nan", "hidden"):
                lse = insert.call(operator.getitem, call, 1)
                out = without_nan(insert, out, lse)
            if site.sinks is not None:
                lse = insert.call(operator.getitem, call, 1)
                out = with_sinks(insert, site, out, lse, site.sinks)
        if plan.indexer is not None:
            self._note_indexer(plan.indexer, plan.lifted)
        drop_asserts(site.region)
        out = _restore_axes(insert, site, out)
        site.output.node.replace_all_uses_with(out)
        self._replaced[site.output.node] = out
        site.scope.gm.graph.erase_node(site.output.node)

    def _current(self, site: AttentionSite) -> AttentionSite:
        """The site with operands that other sites computed as they are now."""
        q, k, v = (
            replace(operand, node=self._replaced.get(operand.node, operand.node))
            for operand in (site.q, site.k, site.v)
        )
        return replace(site, q=q, k=k, v=v)

    def _note_indexer(self, indexer: Indexer, lifted: LiftedMask) -> None:
        if not isinstance(indexer.site, BlockScoresSite) and indexer.site.reached is not None:
            assert lifted.program is not None
            self._lists.setdefault(self._tables.outputs[lifted.program][-2:], indexer)
        else:
            self._indexers.setdefault(indexer.site.scores.output.node, indexer)

    def finish(self) -> None:
        """Replace the indexers, now that all lists are made."""
        for indexer in self._indexers.values():
            replace_indexer(indexer, self._tables)
        for lists, indexer in self._lists.items():
            replace_lists(lists, indexer, self._tables)

    def _operand(self, insert: Inserter, site: AttentionSite, operand: Operand) -> Node:
        node = operand.node
        dtype = example_value(site.output.node).dtype
        if example_value(node).dtype != dtype:
            # Autocast, or an upcast inside the attention: the program computes in this dtype.
            node = insert.method("to", node, dtype)
        return _flattened(insert, node, operand)

    def _mask_data(
        self, insert: Inserter, plan: Plan, q: Node, k: Node
    ) -> tuple[list[Node], list[int | Node], list[Node]]:
        """The tables and sizes of the mask of a plan, and the lists of its parts."""
        tables, sizes = realise(plan.lifted, plan.site.scope, self._tables)
        if plan.site.called is not None:
            sizes = list(plan.site.called.sizes)
        named: list[Any] = []
        if plan.listed is not None:
            sizes, named = sizes[:-2], sizes[-2:]
        early = _where_masks_are_read(insert, plan, tables)
        tables += [self._pattern_table(early, made, plan.site) for made in plan.lifted.extra]
        reads = dense_reads(plan.lifted)
        lists: list[Node] = []
        of_blocks = any(not part.listed for part in plan.spec.parts)
        if reads or of_blocks:
            made = self._layout(early, plan, (tables, sizes), reads)
            for read, words in zip(reads, made, strict=False):
                tables[read.table] = words
            lists = made[len(reads) :]
        if plan.selected is not None:
            others, *named = self._select(insert, plan, (q, k), (tables, sizes))
            tables = others if plan.selected.alone else tables + others
        if any(part.listed for part in plan.spec.parts):
            named = self._layout(insert, plan, (tables, sizes), named=named)
        return tables, sizes, lists + named

    def _fall_back(
        self,
        insert: Inserter,
        plan: Plan,
        operands: tuple[Node, Node, Node],
        scores: tuple[list[Node], float | Node],
        out: Node,
        lse: Node,
    ) -> Node:
        """``out`` with what queries without keys yield: attention to those of its fallbacks."""
        lifted, (learned, scale) = plan.lifted, scores
        # Whether a row is empty rarely depends on the head.
        alike = lifted.selection is None and plan.selected is None and not lifted.mask.depends_on(H)
        empty = insert.call(operator.eq, lse, float("-inf"))
        for fallback in lifted.fallbacks:
            table, at = _rows_of(insert, empty, alike)
            spec, data = self._of_rows(insert, plan, fallback, table, at)
            call = insert.call(ops.ATTENTION, *operands, learned, *data, scale, spec.text)
            again, lse = (insert.call(operator.getitem, call, part) for part in (0, 1))
            out = insert.call(torch.where, insert.method("unsqueeze", empty, -1), again, out)
            still = insert.call(operator.eq, lse, float("-inf"))
            empty = insert.call(operator.and_, empty, still)
            alike = alike and not fallback.mask.depends_on(H)
        policy = lifted.fallbacks[-1].empty_rows
        if policy is EmptyRows.ZERO:
            return out
        reached = operands if policy is EmptyRows.NAN_ADDED else operands[2:]
        return ruined(insert, reached, out, empty)

    def _of_rows(
        self,
        insert: Inserter,
        plan: Plan,
        fallback: LiftedMask,
        table: Node,
        at: tuple[sympy.Symbol, ...],
    ) -> tuple[AttentionSpec, tuple[list[Node], list[int | Node], list[Node]]]:
        """Attention of the rows that a table names to the keys of a fallback."""
        mask, number = fallback.mask, len(fallback.mask.tables)
        rows = sympy.And(sympy.Ne(lookup_of(number)(*at), 0), mask.predicate)
        whole = MaskExpr(rows, (*mask.tables, "bool"), mask.n_sizes)
        spec = replace(plan.spec, mask=whole, coverage=(), score=fallback.score)
        tables, sizes = realise(fallback, plan.site.scope, self._tables)
        tables, reads = [*tables, table], dense_reads(fallback)
        found = replace(plan, spec=spec)
        lists = self._layout(insert, found, (tables, sizes), reads)
        for read, words in zip(reads, lists, strict=False):
            tables[read.table] = words
        return spec, (tables, sizes, lists[len(reads) :])

    def _select(
        self, insert: Inserter, plan: Plan, content: tuple[Node, Node], data: _Data
    ) -> tuple[list[Node], Node, Node]:
        """The tables of the mask of selected keys; index and count of what is selected."""
        chosen, (others, sizes) = plan.selected, data
        assert chosen is not None
        if not chosen.alone:
            # Both masks read the same tables of the program; those of the annotation follow.
            extra = chosen.lifted.extra
            others = others[: chosen.lifted.n_lifted_tables]
            others += [self._pattern_table(insert, made, plan.site) for made in extra]
        given = [insert.method("detach", tensor) for tensor in chosen.given]
        if chosen.key == LISTS:
            index, count = (insert.method("to", t, device_of(content[0])) for t in given)
            return others, index, count
        if chosen.key == INDEX:
            (index,) = given
            index = insert.method("to", index, device_of(content[0]))
            units = self._units(insert, plan.site.k.node, chosen.units[1])
            pair = insert.call(CANONICAL_SELECTION, index, units)
        else:
            q, k = (insert.method("detach", operand) for operand in content)
            rest = given, others, sizes, chosen.lifted.mask.text, chosen.key
            pair = insert.call(SELECT, q, k, *rest)
        index, count = (insert.call(operator.getitem, pair, part) for part in (0, 1))
        return others, index, count

    def _units(self, insert: Inserter, k: Node, unit: int) -> int | Node:
        """How many units of keys there are."""
        n_kv = insert.size(k, 2)
        if isinstance(n_kv, int):
            return -(-n_kv // unit)
        return insert.call(operator.floordiv, insert.call(operator.add, n_kv, unit - 1), unit)

    def _pattern_table(self, insert: Inserter, made: PatternTable, site: AttentionSite) -> Node:
        """A table that an annotation's pattern makes, once for all sites of one shape."""
        device = device_of(site.q.node)
        key = (insert.gm, made, _shape(site), device)
        if key not in self._made or not self._made[key] < insert.anchor:
            table = made.key, made.index, made.rank, getattr(torch, made.dtype)
            sizes = _lengths(insert, site)[:4]
            self._made[key] = insert.call(pattern_ops.PATTERN_TABLE, *table, *sizes, device)
        return self._made[key]

    def _layout(
        self,
        insert: Inserter,
        plan: Plan,
        data: _Data,
        reads: tuple[DenseRead, ...] = (),
        named: Sequence[Node] = (),
    ) -> list[Node]:
        """The tables of bits, if the mask reads mask tensors, and the lists of the blocks.

        Where a selection names the blocks, ``named`` are its index and count.
        """
        site, device, (tables, sizes) = plan.site, device_of(plan.site.q.node), data
        # The layout depends neither on where the attention stands nor on scores: layers share it.
        nothing: dict[str, Any] = {"where": (), "score": None, "dropout": None}
        spec = replace(plan.spec.blocks, empty_rows=EmptyRows.ZERO, **nothing)
        given = tuple(tables), tuple(sizes), tuple(named)
        key = insert.gm, spec.text, _shape(site), device, reads, given
        if key not in self._layouts:
            rest = sizes, *_lengths(insert, site), spec.text, device, list(named)
            call = insert.call(ops.LAYOUT, tables, DenseRead.text(reads), *rest)
            parts = range(len(example_value(call)))
            self._layouts[key] = [insert.call(operator.getitem, call, part) for part in parts]
        return self._layouts[key]


def _where_masks_are_read(insert: Inserter, plan: Plan, tables: list[Node]) -> Inserter:
    """What inserts where the program reads its masks: it may write to a mask tensor later."""
    site, lifted = plan.site, plan.lifted
    if not lifted.dense:
        return insert
    early = Inserter(insert.gm, first_reader(site, *(mask.node for mask in site.masks)))
    if all(operand.node < early.anchor for operand in (site.q, site.k)):
        return early
    for read in dense_reads(lifted):
        tables[read.table] = early.method("clone", tables[read.table])
    return insert


def _dims(site: AttentionSite) -> list[tuple[Operand, str]]:
    """Where batch, heads, both lengths and the heads of the keys are found."""
    return [(site.q, "b"), (site.q, "h"), (site.q, "n"), (site.k, "n"), (site.k, "h")]


def _lengths(insert: Inserter, site: AttentionSite) -> list[int | Node]:
    """Batch, heads, both lengths and the heads of the keys, as arguments."""
    return [insert.length(x, axis) for x, axis in _dims(site)]


def _shape(site: AttentionSite) -> tuple[str, ...]:
    """The same as they were captured."""
    return tuple(str(dimension(x, axis)) for x, axis in _dims(site))


def _checked(insert: Inserter, site: AttentionSite, q: Node, k: Node) -> Node:
    """The queries, after a check of what the user promised about the mask."""
    note = site.annotation
    if note is None or not note.promise:
        return q
    masks = [mask.node for mask in site.masks]
    shown = f"{note.pattern!r} on {note.target}, {site.where[-1] if site.where else 'unknown'}"
    plan = pattern_ops.promise_plan(
        [mask.role for mask in site.masks], site.score_axes, site.causal, shown
    )
    return insert.call(pattern_ops.CHECK_PROMISE, q, masks, insert.size(k, 2), note.key, plan)


def _scale(insert: Inserter, site: AttentionSite, q: Node) -> tuple[Node, float | Node]:
    """The scale as an operator argument; a tensor is multiplied into q, keeping its gradient."""
    if not isinstance(site.scale, Node):
        return q, float(site.scale)
    if isinstance(example_value(site.scale), torch.Tensor):
        scaled = insert.call(operator.mul, q, site.scale)
        return insert.method("to", scaled, example_value(q).dtype), 1.0
    return q, site.scale


def _rows_of(insert: Inserter, empty: Node, alike: bool) -> tuple[Node, tuple[sympy.Symbol, ...]]:
    """A table of queries [B, Hq, Nq], and its coordinates; one head of it, if all are alike."""
    if not alike:
        return empty, (B, H, Q)
    return insert.call(operator.getitem, empty, (slice(None), 0)), (B, Q)


def _seed(insert: Inserter, site: AttentionSite) -> list[Node]:
    """What the dropout of this call follows from, drawn in each call."""
    if not site.dropout:
        return []
    kind = {"dtype": torch.int64, "device": device_of(site.q.node)}
    return [insert.call(torch.randint, 0, (1 << 31) - 1, (2,), **kind)]


def _call_sdpa(
    insert: Inserter, plan: Plan, q: Node, k: Node, v: Node, scale: float | Node
) -> Node:
    given: dict[str, Any] = {"is_causal": plan.causal, "scale": scale}
    if plan.site.dropout:
        given["dropout_p"] = plan.site.dropout
    if example_value(q).shape[1] != example_value(k).shape[1]:
        given["enable_gqa"] = True
    return insert.call(F.scaled_dot_product_attention, q, k, v, **given)


def _flattened(insert: Inserter, node: Node, operand: Operand) -> Node:
    """An operand, which ``node`` holds, as [B, H, N, D]."""
    if "bh" in operand.axes:
        at = operand.axes.index("bh")
        node = insert.method("unflatten", node, at, (-1, operand.split[1]))
        axes = (*operand.axes[:at], "b", "h", *operand.axes[at + 1 :])
    else:
        axes = operand.axes
    names = [axis for axis in CANONICAL if axis in axes]
    node = with_axes(insert.method, node, axes, names)
    for outer, inner in (("b1", "b2"), ("h1", "h2")):
        if outer in names and inner in names:
            at = names.index(outer)
            node = insert.method("flatten", node, at, at + 1)
            names[at : at + 2] = [outer[0]]
    return with_axes(insert.method, node, [name[0] for name in names], _CANONICAL)


def _restore_axes(insert: Inserter, site: AttentionSite, out: Node) -> Node:
    """Back to the axes, and where a later view relies on it the memory order, of the old output."""
    names = list(_CANONICAL)
    for outer, inner in (("b1", "b2"), ("h1", "h2")):
        if inner in site.output.axes:
            at = names.index(outer[0])
            size = insert.size(site.q.node, site.q.axes.index(inner))
            out = insert.method("unflatten", out, at, (-1, size))
            names[at : at + 1] = [outer, inner]
    out = with_axes(insert.method, out, names, site.output.axes)
    old = site.output.node
    reordered = example_value(old).is_contiguous() and not example_value(out).is_contiguous()
    if reordered and not all(map(_swaps_heads_and_tokens, old.users)):
        out = insert.method("contiguous", out)
    return out


def _swaps_heads_and_tokens(user: Node) -> bool:
    """Whether a user reads [B, H, N, D] as [B, N, H, D]: then our memory order is its own."""
    if user.op != "call_method":
        return False
    dims = [dim % 4 if isinstance(dim, int) else dim for dim in user.args[1:]]
    if user.target in ("transpose", "swapaxes"):
        return sorted(map(str, dims)) == ["1", "2"]
    return user.target == "permute" and dims == [0, 2, 1, 3]

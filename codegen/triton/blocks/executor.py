"""Launch the generated kernels for attention to blocks: forward and backward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen import by_token
from sparse_compile.codegen.attend import Gradients
from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.entry import labelled
from sparse_compile.codegen.triton import calls
from sparse_compile.codegen.triton.blocks.gradients import gradient_of
from sparse_compile.codegen.triton.blocks.learned import looked_up
from sparse_compile.codegen.triton.calls import Prepared, Running
from sparse_compile.codegen.triton.entries import axis_of, merge_of
from sparse_compile.codegen.triton.tile import Tile, padded
from sparse_compile.errors import BadShape
from sparse_compile.expr import table_index
from sparse_compile.layout import Layout
from sparse_compile.layout.block_layout import places_of
from sparse_compile.layout.schedule import Schedule, workers_of
from sparse_compile.spec import AttentionSpec, KernelSpec
from sparse_compile.spec.target import Target
from sparse_compile.spec.view import Order


@dataclass(frozen=True)
class Pass:
    """One of the three kernels that loop over blocks.

    Attributes:
        name: of the kernel.
        axis: side of its lines, ``"q"`` or ``"kv"``.
        sections: the views of each.
        tile: what its programs hold.
        subtiles: tiles to a line.
        widths: of the rows of its results, by name.
    """

    name: str
    axis: str
    sections: tuple[tuple[int, ...], ...]
    tile: Tile
    subtiles: int
    widths: Mapping[str, int]

    @staticmethod
    def of(name: str, spec: AttentionSpec, tile: Tile, widths: Mapping[str, int]) -> Pass:
        """That of a kernel of a spec."""
        axis = axis_of(name)
        block = spec.block_q if axis == "q" else spec.block_kv
        return Pass(name, axis, spec.sections(axis), tile, block // tile.extent(axis), widths)

    def run(self, running: Running, tensors: Mapping[str, Tensor], unused: Tensor) -> None:
        """Launch it.

        Args:
            running: the call.
            tensors: what it takes beside the operands, its results among them.
            unused: fp32, stands for parts where no line is split.
        """
        batch, heads = running.call.q.shape[0], self._heads(running.call)
        for section, (given, work) in enumerate(self._sections(running)):
            tiles = self.subtiles * batch * heads
            parts = self._parts(work.slots * tiles, unused)
            workers = Target.of(running.call.q.device).workers
            grid = (self.tile.programs(work.items.shape[0] * tiles, workers),)
            running.start(labelled(self.name, section), grid, {**tensors, **given, **parts})
            if work.slots:
                of_merge = work.merges.shape[0] * self.subtiles, heads, batch
                self._merge(running, section, of_merge, {**tensors, **parts, "merges": work.merges})

    def _heads(self, call: AttentionCall) -> int:
        return (call.q if self.axis == "q" else call.k).shape[1]

    def _sections(self, running: Running) -> list[tuple[dict[str, Any], Schedule]]:
        """For each section its lists and its worklist, by name, and the latter whole."""
        call, layout = running.call, running.call.blocks
        members = call.q.shape[0] * self._heads(call)
        key = self.axis, members
        if key not in layout.derived:
            # The lists may be being made: what does not wait for them comes first.
            lists = [_list_values(layout, self.axis, own) for own in self.sections]
            works = layout.schedules(self.axis, members, workers_of(call.q.device), call.q.device)
            layout.derived[key] = [
                ({**given, "items": w.items, "n_items": w.items.shape[0], "heavy": w.heavy}, w)
                for given, w in zip(lists, works, strict=True)
            ]
        found: list[tuple[dict[str, Any], Schedule]] = layout.derived[key]
        return found

    def _parts(self, slots: int, unused: Tensor) -> dict[str, Tensor]:
        """Room for the parts of results, fp32 [slots, rows of a tile, columns]."""
        if not slots:
            return {f"PART_{name}": unused for name in self.widths}
        return {
            f"PART_{name}": torch.empty(
                (slots, self.tile.extent(self.axis), padded(width) if width > 1 else 1),
                dtype=torch.float32,
                device=unused.device,
            )
            for name, width in self.widths.items()
        }

    def _merge(
        self, running: Running, section: int, grid: tuple[int, ...], given: dict[str, Any]
    ) -> None:
        """Merge the parts of split lines: by their log-sum-exps, or the sums of gradients."""
        label = labelled(merge_of(self.name), section)
        if self.name == "forward":
            running.start(label, grid, given)
            return
        for name, width in self.widths.items():
            one = {"PART": given[f"PART_{name}"], "GRAD": given[name], "merges": given["merges"]}
            running.start(label, grid, one, DIM=width, PAD=padded(width))


def _list_values(layout: Layout, axis: str, own: Sequence[int]) -> dict[str, Any]:
    """Of each view of a section the lists, their room, lines, batches and heads, by name."""
    values: dict[str, Any] = {}
    for number in own:
        view = layout.views[number]
        side, lines = (view.rows, view.grid[0]) if axis == "q" else (view.cols, view.grid[1])
        values[f"start_{number}"] = side.start
        values[f"counts_{number}"] = side.counts
        values[f"index_{number}"] = side.index
        values[f"room_{number}"] = side.index.shape[1]
        values[f"lines_{number}"] = lines
        values[f"batches_{number}"], values[f"heads_{number}"] = view.batches, view.heads
    return values


@dataclass(frozen=True, eq=False)
class _Blocks:
    """How calls of equal shapes go through the blocks.

    Attributes:
        passes: in the order in which they run.
        complete: whether the first section reaches every query, and every key.
        orders: of queries, by the names of the statistics that stand in them.
    """

    passes: tuple[Pass, ...]
    complete: tuple[bool, bool]
    orders: Mapping[str, Order]


def _prepared(
    call: AttentionCall,
    direction: str,
    tensors: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    widths: Mapping[str, Mapping[str, int]],
    **values: int,
) -> tuple[Prepared, _Blocks]:
    """For calls like this one; ``tensors`` as for :meth:`Prepared.of`.

    Args:
        widths: of the results of each kernel, by their names.
        values: of further parameters.
    """
    _check(call)
    (_, heads, n_q, n_kv), views = call.shape, call.spec.parts
    shape = call.q.shape[3], call.v.shape[3], calls.dtype_of(call), Target.of(call.q.device).arch
    # Whether the lengths are multiples of the radices of all views.
    exact = all(n_q % v.q.strides[0] == 0 and n_kv % v.kv.strides[0] == 0 for v in views)
    spec = KernelSpec(call.spec, *shape, exact)
    values["GROUP"] = heads // call.k.shape[1]
    orders = {f"STATISTICS_{v}": view.q for v, view in enumerate(views) if view.q.radices}
    values |= {f"lines_{v}_q": view.q.blocks(n_q) for v, view in enumerate(views)}
    prepared = Prepared.of(spec, call, direction, tensors, values)
    tiles = {name: prepared.launchers[name].entry.tile for name in widths}
    passes = (Pass.of(name, call.spec, tiles[name], widths[name]) for name in widths)
    first_q, first_kv = (call.spec.sections(axis)[0][0] for axis in ("q", "kv"))
    complete = views[first_q].q.is_complete, views[first_kv].kv.is_complete
    return prepared, _Blocks(tuple(passes), complete, orders)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Block-sparse attention.

    Returns:
        out [B, Hq, Nq, Dv] in q's dtype, stored as [B, Nq, Hq, Dv], 0 on empty rows; and the
        natural log-sum-exp [B, Hq, Nq] in fp32, -inf on empty rows.
    """
    (batch, heads, n_q, _), width = call.shape, call.v.shape[3]
    _check_layout(call)
    out = call.q.new_empty(batch, n_q, heads, width).transpose(1, 2)
    lse = torch.empty((batch, heads, n_q), dtype=torch.float32, device=call.q.device)
    if not call.q.numel() or not call.k.numel():
        return out.zero_(), lse.fill_(-math.inf)

    def prepare() -> tuple[Prepared, _Blocks]:
        widths = {"forward": {"OUT": width, "LSE": 1}}
        return _prepared(call, "forward", ({}, {"OUT": out}), widths)

    def run(prepared: Prepared, blocks: _Blocks) -> tuple[Tensor, Tensor]:
        if not blocks.complete[0]:
            out.zero_()
            lse.fill_(-math.inf)
        running = prepared.running(call, {})
        blocks.passes[0].run(running, {"OUT": out, "LSE": lse}, lse)
        return out, lse

    return calls.served(("forward", *calls.key_of(call)), prepare, run, call.q.device)


def backward(call: AttentionCall, result: AttentionResult) -> Gradients:
    """Gradients of :func:`forward`: ``(dq, dk, dv, *wanted)``, in their dtypes."""
    _check_layout(call)
    q, k, v = call.q, call.k, call.v
    if not q.numel() or not k.numel():
        return tuple(map(calls.zeros, (q, k, v, *(call.learned[i] for i in result.wanted))))
    has_grad_lse, n_q = result.grad_lse is not None, q.shape[2]
    # At least one that does not exist, and all that blocks stick out by.
    unit = math.lcm(128, call.spec.block_q)
    rows = (n_q // unit + 1) * unit
    read = {"OUT": result.out, "GRAD_OUT": result.grad_out.to(q.dtype)}

    def prepare() -> tuple[Prepared, _Blocks]:
        widths = {
            "backward_query": {"GRAD_Q": q.shape[3]},
            "backward_key_value": {"GRAD_K": k.shape[3], "GRAD_V": v.shape[3]},
        }
        values = {"rows": rows, "HAS_GRAD_LSE": has_grad_lse}
        return _prepared(call, "backward", (read, {}), widths, **values)

    def run(prepared: Prepared, blocks: _Blocks) -> Gradients:
        dq = _gradient(q, blocks.complete[0])
        dk, dv = (_gradient(t, blocks.complete[1]) for t in (k, v))
        lse = result.lse.contiguous()
        statistics = _statistics(lse, rows, bool(blocks.orders))
        running = prepared.running(call, read)
        running.given["STATISTICS"] = statistics
        by_query, by_key = blocks.passes
        taken = {"LSE": lse, "GRAD_LSE": calls.single(result.grad_lse, lse), "GRAD_Q": dq}
        others: list[Tensor] = []
        if result.wanted:
            others = _with_learned(running, taken, result.wanted)
        else:
            by_query.run(running, taken, lse)
        by_key.run(running, {"GRAD_K": dk, "GRAD_V": dv, **_in_order(blocks, statistics, n_q)}, lse)
        sign = prepared.operands.sign
        return dq if sign == 1 else dq.mul_(sign), dk, dv, *others

    key = "backward", has_grad_lse, *calls.key_of(call, *read.values())
    return calls.served(key, prepare, run, q.device)


def _with_learned(
    running: Running, taken: Mapping[str, Tensor], wanted: Sequence[int]
) -> list[Tensor]:
    """The gradients of queries, for which there is room, and those of learned tensors.

    Args:
        running: the call.
        taken: what the kernel of queries takes.
        wanted: numbers of learned tensors.
    """
    call, spec = running.call, running.call.spec
    tile: Tile = running.tile("backward_learned")
    looked = looked_up(spec)
    asked = [one for one in looked if table_index(one.lookup) in wanted]
    subtiles, views = spec.block_q // tile.m, call.blocks.views
    sections = spec.sections("q")
    lines = [views[own[0]].grid[0] for own in sections]
    tiles = max(lines) * subtiles
    left = {
        one.number: torch.zeros(one.shape(call, tiles), dtype=torch.float32, device=call.q.device)
        for one in asked
    }
    sums = {f"SUM_{one.number}": left.get(one.number) for one in looked}
    own: dict[str, int] = {f"WANT_{one.number}": one in asked for one in looked}
    for one in looked:
        own |= one.placed(call)
    batch, heads, _, _ = call.shape
    for number, section in enumerate(sections):
        grid = lines[number] * subtiles, heads, batch
        values = {**taken, **sums, **own, **_list_values(call.blocks, "q", section), "tiles": tiles}
        running.start(labelled("backward_learned", number), grid, values)
    return [gradient_of(running, i, asked, left) for i in wanted]


def _gradient(of: Tensor, complete: bool) -> Tensor:
    """Room for a gradient; zeros where no section reaches every row."""
    return by_token.room_like(of, torch.empty if complete else torch.zeros)


def _statistics(lse: Tensor, rows: int, filled: bool) -> Tensor:
    """Room for the statistics of queries, fp32 [2, B, H, rows], which the first kernel writes."""
    batch, heads, n_q = lse.shape
    statistics = lse.new_empty(2, batch, heads, rows)
    if filled:
        # What stands for a query that does not exist: places that fill up a block read it.
        statistics[0, ..., n_q:] = math.inf
        statistics[1, ..., n_q:] = 0.0
    return statistics


def _in_order(blocks: _Blocks, statistics: Tensor, n_q: int) -> dict[str, Tensor]:
    """The statistics of queries in the order of each view that is not the plain one."""
    found = {
        order: statistics.index_select(3, places_of(order, n_q, statistics.device))
        for order in dict.fromkeys(blocks.orders.values())
    }
    return {name: found[order] for name, order in blocks.orders.items()}


def _check_layout(call: AttentionCall) -> None:
    """Raise if the layout that was given is of other lengths; lists are unpacked for the call's."""
    given = call.layout
    if given is not None and (given.n_q, given.n_kv) != call.shape[2:]:
        found = given.n_q, given.n_kv
        raise BadShape(f"sparse_compile: a layout of {found} for lengths {call.shape[2:]}.")


def _check(call: AttentionCall) -> None:
    """Raise for shapes that do not fit together, or more than the kernels can number."""
    (batch, heads, n_q, n_kv), kv_heads = call.shape, call.k.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise BadShape(f"sparse_compile: {heads} query heads for {kv_heads} key heads.")
    if max(n_q, n_kv) >= calls.LIMIT or max(batch, heads) > 65535:
        raise BadShape(
            f"sparse_compile: q {list(call.q.shape)} and k {list(call.k.shape)}: lengths must be "
            f"below {calls.LIMIT}, batch and heads at most 65535."
        )

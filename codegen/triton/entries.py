"""The parameters of the kernels for attention to blocks."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

from sparse_compile.codegen.entry import (
    Entry,
    Kind,
    Line,
    Parameter,
    constants,
    integers,
    lists,
    number,
    pointers,
    sizes,
    strides,
)
from sparse_compile.codegen.triton.blocks.learned import looked_up
from sparse_compile.codegen.triton.blocks.sections import Described, across, described_views
from sparse_compile.codegen.triton.blocks.tiles import Tiles, tile_of_learned
from sparse_compile.codegen.triton.tile import Tile, padded
from sparse_compile.expr import MaskExpr, ScoreProgram, table_index
from sparse_compile.spec import AttentionSpec, KernelSpec

#: Operands and results whose strides kernels are told.
_STRIDED = ("Q", "K", "V", "OUT", "GRAD_OUT")


def axis_of(name: str) -> str:
    """The side of the lines of a kernel, ``"q"`` or ``"kv"``."""
    return "kv" if name.endswith("key_value") else "q"


def merge_of(name: str) -> str:
    """The kernel that merges what a kernel left of split lines."""
    return f"merge_{name.removeprefix('backward_')}"


def entries_of(spec: KernelSpec, tiles: Tiles) -> tuple[Entry, ...]:
    """The kernels of a module; one entry for each section, which is a launch."""
    half, single = partial(pointers, spec.dtype), partial(pointers, "float32")
    ahead = half("Q", "K", "V", "OUT") + single("LSE", "PART_OUT", "PART_LSE")
    by_query = (
        half("Q", "K", "V", "OUT", "GRAD_OUT")
        + single("LSE", "GRAD_LSE", "STATISTICS")
        + half("GRAD_Q")
    )
    by_key = (
        half("Q", "K", "V", "GRAD_OUT")
        + single("STATISTICS")
        + half("GRAD_K", "GRAD_V")
        + single("PART_GRAD_K", "PART_GRAD_V")
    )
    found: tuple[Entry, ...] = (
        _loop("forward", spec, tiles.forward, ahead),
        _merge_forward(spec),
        _loop(
            "backward_query",
            spec,
            tiles.backward_query,
            by_query + single("PART_GRAD_Q"),
            HAS_GRAD_LSE=True,
        ),
        _merge_sum("merge_query", spec),
        _loop("backward_key_value", spec, tiles.backward_key_value, by_key),
        _merge_sum("merge_key_value", spec),
    )
    learned = bool(learned_ranks(spec.attention.score))
    if learned:
        found += (_learned(spec, tile_of_learned(spec, tiles), by_query),)
    of_sections = tuple(
        entry.of_section(number, _of_others(spec, axis_of(entry.name), own, entry.tile))
        for entry in found
        for number, own in enumerate(spec.attention.sections(axis_of(entry.name)))
    )
    return (*of_sections, merge_learned()) if learned else of_sections


def _of_others(
    spec: KernelSpec, axis: str, own: tuple[int, ...], tile: Tile | None
) -> frozenset[str]:
    """What is for the views of other sections: every argument costs time at each launch."""
    if tile is None:
        return frozenset()
    others = [number for number in range(len(spec.attention.parts)) if number not in own]
    lines = [line for v in others for line in (view_lists(v), _in_order(v))]
    lines += [
        _described(spec, across(axis), one)
        for one in described_views(spec, across(axis), tile)
        if not set(one.views) & set(own)
    ]
    return frozenset(parameter.name for line in lines for parameter in line)


def strided(tensors: Line) -> tuple[Line, ...]:
    """The strides of those of some tensors that are operands or results."""
    return strides(*(tensor.name for tensor in tensors if tensor.name in _STRIDED))


def data_lines(attention: AttentionSpec) -> tuple[Line, ...]:
    """What carries run-time data: a line for each tensor of the score and the mask; the sizes."""
    mask, dtypes = attention.mask, attention.learned
    learned = [_table(f"w{w}", n, dtypes[w]) for w, n in learned_ranks(attention.score).items()]
    if attention.dropout is not None:
        learned.append(pointers("int64", f"w{attention.dropout.seed}"))
    ranks = table_ranks(mask, attention.score)
    tables = (_table(f"t{t}", n, mask.tables[t]) for t, n in ranks.items())
    return *learned, *tables, sizes(*(f"s{i}" for i in range(mask.n_sizes)))


def _table(name: str, rank: int, dtype: str) -> Line:
    """A table, its strides and its sizes; ahead of time, the last of its strides is one."""
    axes = range(rank)
    steps = [f"{name}_stride{axis}" for axis in axes]
    inner = integers(*steps[:-1], assumed=None) + integers(*steps[-1:], assumed=1)
    return pointers(dtype, name) + inner + sizes(*(f"{name}_size{axis}" for axis in axes))


def table_ranks(mask: MaskExpr, score: ScoreProgram | None) -> dict[int, int]:
    """The tables that a predicate and a score program read, and how many dimensions each has."""
    lookups = (*mask.lookups, *(() if score is None else score.table_lookups))
    ranks = {table_index(lookup): len(lookup.args) for lookup in lookups}
    return dict(sorted(ranks.items()))


def learned_ranks(score: ScoreProgram | None) -> dict[int, int]:
    """The learned tensors that a score program reads, and how many dimensions each has."""
    lookups = () if score is None else score.lookups
    return {table_index(lookup): len(lookup.args) for lookup in lookups}


def _loop(name: str, spec: KernelSpec, tile: Tile, tensors: Line, **own: Any) -> Entry:
    """A kernel that loops over the blocks of a line.

    Args:
        name: of it.
        spec: of the module.
        tile: what a program holds.
        tensors: that it reads and writes.
        own: constants that others do not have.
    """
    attention, axis = spec.attention, axis_of(name)
    # The worklist, and the shape of the problem.
    work = lists("items") + sizes("n_items", "heavy", f"{axis}_heads", "batch", "n_q", "n_kv")
    rows = () if name == "forward" else sizes("rows")
    others = [v for v, view in enumerate(attention.parts) if axis == "kv" and view.q.radices]
    lines = (
        tensors,
        *strided(tensors),
        work + rows + number("scale"),
        *map(view_lists, range(len(attention.parts))),
        *map(_in_order, others),
        *(_described(spec, across(axis), v) for v in described_views(spec, across(axis), tile)),
        *data_lines(attention),
        *constants(**own, SECTION=0, GROUP=1),
    )
    return Entry(name, lines, tile.options, tile)


def _learned(spec: KernelSpec, tile: Tile, by_query: Line) -> Entry:
    """The gradients of queries and of learned tensors.

    Args:
        spec: of the module.
        tile: what a program holds.
        by_query: what the kernel of queries alone takes. This one takes beside it what it leaves
            for each lookup, and whether.
    """
    assert spec.attention.score is not None
    lookups = range(len(spec.attention.score.lookups))
    left = pointers("float32", *(f"SUM_{n}" for n in lookups))
    own: dict[str, Any] = {f"WANT_{n}": True for n in lookups}
    entry = _loop("backward_learned", spec, tile, by_query + left, HAS_GRAD_LSE=True, **own)
    # It goes through every line as a whole: no worklist, but the number of tiles of queries.
    gone = {"items", "n_items", "heavy"}
    lines = [tuple(p for p in line if p.name not in gone) for line in entry.lines]
    at = next(n for n, line in enumerate(lines) if any(p.name == "rows" for p in line))
    placed = (name for one in looked_up(spec.attention) for name in one.parameters)
    lines[at] += sizes("tiles", *placed)
    return replace(entry, lines=tuple(lines))


def _merge_forward(spec: KernelSpec) -> Entry:
    parts, out = pointers("float32", "PART_OUT", "PART_LSE"), pointers(spec.dtype, "OUT")
    given = parts + out + pointers("float32", "LSE") + pointers("int32", "merges")
    return Entry("merge_forward", (given, *strided(out), sizes("n_q"), *constants(SECTION=0)))


def merge_learned() -> Entry:
    """Of a tensor of any dtype."""
    rows = sizes("blocks", "width", "n_x", "kept_h", "kept_r")
    rows += sizes("n_added", "added_b", "added_h", "added_r")
    steps = sizes(*(f"step_{axis}" for axis in "0bhrx"))
    given = pointers("float32", "SUM", "GRAD")
    return Entry("merge_learned", (given, rows, steps, *constants(ENDS=True, ROWS=64, COLUMNS=64)))


def _merge_sum(name: str, spec: KernelSpec) -> Entry:
    given = pointers("float32", "PART") + pointers(spec.dtype, "GRAD") + pointers("int32", "merges")
    width = constants(SECTION=0, DIM=spec.head_dim, PAD=padded(spec.head_dim))
    return Entry(name, (given + sizes(f"n_{axis_of(name)}"), *width))


def view_lists(number: int) -> Line:
    """The lists of a view, their room, and their lines and classes."""
    shape = sizes(*(f"{name}_{number}" for name in ("room", "lines", "batches", "heads")))
    return lists(f"start_{number}", f"counts_{number}", f"index_{number}") + shape


def _in_order(number: int) -> Line:
    """The statistics of queries in the order of a view, which is not the plain one."""
    return lists(f"STATISTICS_{number}", dtype="float32") + sizes(f"lines_{number}_q")


def _described(spec: KernelSpec, axis: str, one: Described) -> Line:
    names = ("K", "V") if axis == "kv" else ("Q", "GRAD_OUT")
    radices = one.order.radices
    found = tuple(
        Parameter(
            f"{name}_TILES{one.suffix}",
            Kind.DESCRIPTOR,
            spec.dtype,
            block=(1, 1, *one.box, padded(dim)),
            tensor=name,
            radices=radices,
        )
        for name, dim in zip(names, (spec.head_dim, spec.value_dim), strict=True)
    )
    if axis == "kv":
        return found
    name, of = f"STATISTICS_TILES{one.suffix}", f"STATISTICS{one.suffix}"
    block = (1, 1, 1, math.prod(one.box))
    return (*found, Parameter(name, Kind.DESCRIPTOR, "float32", block=block, tensor=of))

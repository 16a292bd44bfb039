"""The parameters of the kernels for attention to blocks."""

from __future__ import annotations

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
from sparse_compile.codegen.triton.blocks.sections import Described, described_views
from sparse_compile.codegen.triton.blocks.tiles import Tile, Tiles, padded
from sparse_compile.expr import MaskExpr, table_index
from sparse_compile.spec import KernelSpec

_BACKWARD = ("q", "k", "v", "grad_out")


def entries_of(spec: KernelSpec, tiles: Tiles) -> tuple[Entry, ...]:
    """The kernels of a module; one entry for each section, which is a launch."""
    ahead, by_query, by_key = tiles.forward, tiles.backward_query, tiles.backward_key_value
    found = (
        ("q", Entry("forward", _forward(spec, ahead), ahead.options, ahead)),
        ("q", Entry("merge_forward", _merge_forward(spec))),
        ("q", Entry("backward_query", _query(spec, by_query), by_query.options, by_query)),
        ("q", Entry("merge_query", _merge_sum(spec, "q"))),
        ("kv", Entry("backward_key_value", _key_value(spec, by_key), by_key.options, by_key)),
        ("kv", Entry("merge_key_value", _merge_sum(spec, "kv"))),
    )
    return tuple(
        entry.of_section(number, _of_others(spec, axis, own, entry.tile))
        for axis, entry in found
        for number, own in enumerate(spec.attention.sections(axis))
    )


def _of_others(
    spec: KernelSpec, axis: str, own: tuple[int, ...], tile: Tile | None
) -> frozenset[str]:
    """What is for the views of other sections: every argument costs time at each launch."""
    if tile is None:
        return frozenset()
    others = [number for number in range(len(spec.attention.parts)) if number not in own]
    lines = [line for v in others for line in (_view_lists(v), _in_order(v))]
    across = "kv" if axis == "q" else "q"
    lines += [
        _described(spec, across, one)
        for one in described_views(spec, across, tile)
        if not set(one.views) & set(own)
    ]
    return frozenset(parameter.name for line in lines for parameter in line)


def mask_lines(mask: MaskExpr) -> tuple[Line, ...]:
    """What carries a mask's run-time data: a line for each table, then the sizes."""
    tables = tuple(_table(t, rank, mask.tables[t]) for t, rank in table_ranks(mask).items())
    return *tables, sizes(*(f"s{i}" for i in range(mask.n_sizes)))


def _table(number: int, rank: int, dtype: str) -> Line:
    """A table, its strides and its sizes; ahead of time, the last of its strides is one."""
    name, axes = f"t{number}", range(rank)
    steps = [f"{name}_stride{axis}" for axis in axes]
    inner = integers(*steps[:-1], assumed=None) + integers(*steps[-1:], assumed=1)
    return pointers(dtype, name) + inner + sizes(*(f"{name}_size{axis}" for axis in axes))


def table_ranks(mask: MaskExpr) -> dict[int, int]:
    """The tables a predicate reads, and how many dimensions each has."""
    return {table_index(lookup): len(lookup.args) for lookup in mask.lookups}


def _forward(spec: KernelSpec, tile: Tile) -> tuple[Line, ...]:
    return (
        pointers(spec.dtype, "Q", "K", "V", "OUT")
        + pointers("float32", "LSE", "PART_OUT", "PART_LSE"),
        *strides("q", "k", "v", "out"),
        _work("q_heads") + number("scale"),
        *_lists(spec),
        *_descriptors(spec, "kv", tile),
        *mask_lines(spec.attention.mask),
        *constants(SECTION=0, GROUP=1),
    )


def _query(spec: KernelSpec, tile: Tile) -> tuple[Line, ...]:
    return (
        pointers(spec.dtype, "Q", "K", "V", "OUT", "GRAD_OUT")
        + pointers("float32", "LSE", "GRAD_LSE", "STATISTICS")
        + pointers(spec.dtype, "GRAD_Q")
        + pointers("float32", "PART_GRAD_Q"),
        *strides("q", "k", "v", "out", "grad_out"),
        _work("q_heads") + sizes("rows") + number("scale"),
        *_lists(spec),
        *_descriptors(spec, "kv", tile),
        *mask_lines(spec.attention.mask),
        *constants(HAS_GRAD_LSE=True, SECTION=0, GROUP=1),
    )


def _key_value(spec: KernelSpec, tile: Tile) -> tuple[Line, ...]:
    return (
        pointers(spec.dtype, "Q", "K", "V", "GRAD_OUT")
        + pointers("float32", "STATISTICS")
        + pointers(spec.dtype, "GRAD_K", "GRAD_V")
        + pointers("float32", "PART_GRAD_K", "PART_GRAD_V"),
        *strides("q", "k", "v", "grad_out"),
        _work("kv_heads") + sizes("rows") + number("scale"),
        *_lists(spec),
        *(_in_order(v) for v, view in enumerate(spec.attention.parts) if not view.q.is_natural),
        *_descriptors(spec, "q", tile),
        *mask_lines(spec.attention.mask),
        *constants(SECTION=0, GROUP=1),
    )


def _merge_forward(spec: KernelSpec) -> tuple[Line, ...]:
    return (
        pointers("float32", "PART_OUT", "PART_LSE")
        + pointers(spec.dtype, "OUT")
        + pointers("float32", "LSE")
        + pointers("int32", "merges"),
        *strides("out"),
        sizes("n_q"),
        *constants(SECTION=0),
    )


def _merge_sum(spec: KernelSpec, axis: str) -> tuple[Line, ...]:
    grad = pointers(spec.dtype, "GRAD") + pointers("int32", "merges") + sizes(f"n_{axis}")
    width = constants(SECTION=0, DIM=spec.head_dim, PAD=padded(spec.head_dim))
    return pointers("float32", "PART") + grad, *width


def _work(heads: str) -> Line:
    """The worklist, and the shape of the problem."""
    return lists("items") + sizes("n_items", "heavy", heads, "batch", "n_q", "n_kv")


def _lists(spec: KernelSpec) -> tuple[Line, ...]:
    return tuple(_view_lists(number) for number in range(len(spec.attention.parts)))


def _view_lists(number: int) -> Line:
    """The lists of a view, their room, and their lines and classes."""
    shape = sizes(*(f"{name}_{number}" for name in ("room", "lines", "batches", "heads")))
    return lists(f"start_{number}", f"counts_{number}", f"index_{number}") + shape


def _in_order(number: int) -> Line:
    """The statistics of queries in the order of a view, which is not the plain one."""
    return lists(f"STATISTICS_{number}", dtype="float32") + sizes(f"lines_{number}_q")


def _descriptors(spec: KernelSpec, across: str, tile: Tile) -> tuple[Line, ...]:
    """What the loop of a kernel over blocks of a side reads by the copy engine."""
    return tuple(_described(spec, across, one) for one in described_views(spec, across, tile))


def _described(spec: KernelSpec, across: str, one: Described) -> Line:
    read = {"K": spec.head_dim, "V": spec.value_dim}
    if across == "q":
        read = {"Q": spec.head_dim, "GRAD_OUT": spec.value_dim}
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
        for name, dim in read.items()
    )
    if across == "kv":
        return found
    statistics, block = f"STATISTICS{one.suffix}", (1, 1, 1, one.extent)
    name = f"STATISTICS_TILES{one.suffix}"
    kind = Kind.DESCRIPTOR
    return (*found, Parameter(name, kind, "float32", block=block, tensor=statistics))

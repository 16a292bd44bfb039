"""The parameters of the kernels for attention to selected keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_compile.codegen.entry import (
    Entry,
    Kind,
    Line,
    constants,
    number,
    pointers,
    sizes,
)
from sparse_compile.codegen.triton.entries import mask_lines, strided
from sparse_compile.codegen.triton.selected.spec import SelectedKernelSpec
from sparse_compile.codegen.triton.selected.tiles import Tiles
from sparse_compile.codegen.triton.selected.united import union_tile
from sparse_compile.codegen.triton.tile import Tile, padded


def entries_of(spec: SelectedKernelSpec, tiles: Tiles) -> tuple[Entry, ...]:
    """The kernels of a module."""
    united, heads = union_tile(spec), ("q_heads", "kv_heads")
    given, work = pointers("int32", "INDEX", "COUNT"), pointers("int32", "WORK", "PLACES")
    results = pointers(spec.dtype, "OUT") + pointers("float32", "LSE")
    parts = pointers(spec.dtype, "PART_OUT") + pointers("float32", "PART_LSE")
    balance = pointers("int64", "BALANCE")
    yields = balance if united is not None else ()
    tile = tiles.forward
    read = _operands(spec, tile) + given + yields + results
    found = [
        _entry("forward", spec, tile, read, ("parts", "q_heads"), PARTED=False),
        _merge(spec, tile, parts, results),
    ]
    tile = tiles.backward_query
    read = _operands(spec, tile) + given + pointers(spec.dtype, "OUT", "GRAD_OUT")
    read += pointers("float32", "LSE", "GRAD_LSE", "DELTA")
    read += pointers(spec.dtype, "GRAD_Q") + pointers("float32", "GRAD_K", "GRAD_V")
    found.append(_entry("backward_query", spec, tile, read, ("parts", *heads), HAS_GRAD_LSE=True))
    if not spec.adds_by_query:
        plain, items = pointers(spec.dtype, "Q", "K", "V") + work, ("n_work", "first_group")
        grads = pointers(spec.dtype, "GRAD_OUT")
        grads += pointers("float32", "LSE", "DELTA", "GRAD_K", "GRAD_V")
        by_key, transposed = tiles.forward_by_key, tiles.backward_key_value
        found += [
            _entry("forward_by_key", spec, by_key, plain + parts, (*items, "groups")),
            _entry("backward_key_value", spec, transposed, plain + grads, (*items, *heads)),
        ]
    if united is not None:
        named = pointers("int32", "INDEX", "NAMES", "COUNT") + balance
        read = _operands(spec, united) + named + results
        found.append(_entry("forward_union", spec, united, read, ("q_heads",)))
    return tuple(found)


def latent_entry(spec: SelectedKernelSpec, tile: Tile) -> Entry:
    """The forward for latent keys on Hopper; its mask reads no tables."""
    given = pointers(spec.dtype, "Q", "K") + pointers("int32", "INDEX", "COUNT")
    results = pointers(spec.dtype, "OUT") + pointers("float32", "LSE")
    return _entry("forward_latent", spec, tile, given + results, ("q_heads",))


def _entry(
    name: str,
    spec: SelectedKernelSpec,
    tile: Tile,
    tensors: Line,
    shape: tuple[str, ...],
    **own: Any,
) -> Entry:
    """A kernel that goes through lists.

    Args:
        name: of it.
        spec: of the module.
        tile: what a program holds.
        tensors: that it reads and writes.
        shape: sizes, besides those of lists and lengths.
        own: constants that others do not have.
    """
    of_queries = "unions" if name == "forward_union" else "units"
    lines = (
        tensors,
        *strided(tensors),
        sizes("lists", of_queries, "most", *shape, "n_q", "n_kv") + number("scale"),
        *mask_lines(spec.attention.mask),
        *constants(GROUPS_PER_LIST=1, GROUPS_PER_KEY=1, **own),
    )
    return Entry(name, lines, tile.options, tile)


def _merge(spec: SelectedKernelSpec, forward: Tile, parts: Line, results: Line) -> Entry:
    tile = Tile(forward.m, 1, 4, 1)
    lines = (
        parts + pointers("int32", "COUNT") + results,
        *strided(results),
        sizes("lists", "units", "parts", "first_group", "q_heads", "n_q"),
        *constants(GROUPS_PER_LIST=1, COUNTED=True),
    )
    return Entry("merge", lines, tile.options, tile)


def _operands(spec: SelectedKernelSpec, tile: Tile) -> Line:
    """Q, K and V; the latter two may be read by the copy engine."""
    q, k, v = pointers(spec.dtype, "Q", "K", "V")
    if tile.descriptors:
        k, v = (
            replace(p, kind=Kind.DESCRIPTOR, block=(1, 1, tile.n, padded(dim)), tensor=p.name)
            for p, dim in ((k, spec.head_dim), (v, spec.value_dim))
        )
    return q, k, v

"""The parameters of the kernels for attention to selected keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_compile.codegen.entry import Entry, Kind, Line, constants, number, pointers, sizes
from sparse_compile.codegen.triton.entries import data_lines, strided
from sparse_compile.codegen.triton.selected.spec import SelectedKernelSpec
from sparse_compile.codegen.triton.selected.tiles import Tiles
from sparse_compile.codegen.triton.selected.united import union_tile
from sparse_compile.codegen.triton.tile import Tile, padded

#: A list for each unit of queries; who handles which entries; and which way is the faster one.
_LISTS, _WORK = pointers("int32", "INDEX", "COUNT"), pointers("int32", "WORK", "PLACES")
_BALANCE = pointers("int64", "BALANCE")
_HEADS = ("q_heads", "kv_heads")


def entries_of(spec: SelectedKernelSpec, tiles: Tiles) -> tuple[Entry, ...]:
    """The kernels of a module."""
    united, ahead, back = union_tile(spec), tiles.forward, tiles.backward_query
    forward = _operands(spec, ahead) + _LISTS + (_BALANCE if united else ()) + _results(spec)
    backward = (
        _operands(spec, back)
        + _LISTS
        + pointers(spec.dtype, "OUT", "GRAD_OUT")
        + pointers("float32", "LSE", "GRAD_LSE", "DELTA")
        + pointers(spec.dtype, "GRAD_Q")
        + pointers("float32", "GRAD_K", "GRAD_V")
    )
    found = [
        _entry("forward", spec, ahead, forward, ("parts", "q_heads"), PARTED=False),
        _merge(spec, ahead),
        _entry("backward_query", spec, back, backward, ("parts", *_HEADS), HAS_GRAD_LSE=True),
    ]
    if not spec.adds_by_query:
        found += _by_key(spec, tiles)
    if united is not None:
        named = pointers("int32", "INDEX", "NAMES", "COUNT") + _BALANCE
        read = _operands(spec, united) + named + _results(spec)
        found.append(_entry("forward_union", spec, united, read, ("q_heads",)))
    return tuple(found)


def _by_key(spec: SelectedKernelSpec, tiles: Tiles) -> list[Entry]:
    read, items = pointers(spec.dtype, "Q", "K", "V") + _WORK, ("n_work", "first_group")
    grads = pointers("float32", "LSE", "DELTA", "GRAD_K", "GRAD_V")
    forward, backward = read + _parts(spec), read + pointers(spec.dtype, "GRAD_OUT") + grads
    ahead, back = tiles.forward_by_key, tiles.backward_key_value
    return [
        _entry("forward_by_key", spec, ahead, forward, (*items, "groups")),
        _entry("backward_key_value", spec, back, backward, (*items, *_HEADS)),
    ]


def latent_entry(spec: SelectedKernelSpec, tile: Tile) -> Entry:
    """The forward for latent keys on Hopper; its mask reads no tables."""
    tensors = pointers(spec.dtype, "Q", "K") + _LISTS + _results(spec)
    return _entry("forward_latent", spec, tile, tensors, ("q_heads",))


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
        *data_lines(spec.attention),
        *constants(GROUPS_PER_LIST=1, GROUPS_PER_KEY=1, **own),
    )
    return Entry(name, lines, tile.options, tile)


def _merge(spec: SelectedKernelSpec, forward: Tile) -> Entry:
    tile, results = Tile(forward.m, 1, 4, 1), _results(spec)
    lines = (
        _parts(spec) + pointers("int32", "COUNT") + results,
        *strided(results),
        sizes("lists", "units", "parts", "first_group", "q_heads", "n_q"),
        *constants(GROUPS_PER_LIST=1, COUNTED=True),
    )
    return Entry("merge", lines, tile.options, tile)


def _results(spec: SelectedKernelSpec) -> Line:
    return pointers(spec.dtype, "OUT") + pointers("float32", "LSE")


def _parts(spec: SelectedKernelSpec) -> Line:
    return pointers(spec.dtype, "PART_OUT") + pointers("float32", "PART_LSE")


def _operands(spec: SelectedKernelSpec, tile: Tile) -> Line:
    """Q, K and V; the latter two may be read by the copy engine."""
    q, k, v = pointers(spec.dtype, "Q", "K", "V")
    if tile.descriptors:
        k, v = (
            replace(p, kind=Kind.DESCRIPTOR, block=(1, 1, tile.n, padded(dim)), tensor=p.name)
            for p, dim in ((k, spec.head_dim), (v, spec.value_dim))
        )
    return q, k, v

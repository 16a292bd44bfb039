"""The parameters of the kernels for attention to selected keys."""

from __future__ import annotations

from dataclasses import replace

from sparse_compile.codegen.entry import (
    Entry,
    Kind,
    Line,
    constants,
    number,
    pointers,
    sizes,
    strides,
)
from sparse_compile.codegen.triton.entries import mask_lines
from sparse_compile.codegen.triton.selected.spec import SelectedKernelSpec
from sparse_compile.codegen.triton.selected.tiles import Tiles
from sparse_compile.codegen.triton.selected.united import union_tile
from sparse_compile.codegen.triton.tile import Tile, padded


def entries_of(spec: SelectedKernelSpec, tiles: Tiles) -> tuple[Entry, ...]:
    """The kernels of a module."""
    united = union_tile(spec)
    merge = Tile(tiles.forward.m, 1, 4, 1)
    found = [
        _entry("forward", _forward(spec, tiles.forward, united is not None), tiles.forward),
        _entry("merge", _merge(spec), merge),
        _entry("backward_query", _query(spec, tiles.backward_query), tiles.backward_query),
    ]
    if not spec.adds_by_query:
        by_key, transposed = tiles.forward_by_key, tiles.backward_key_value
        found += [
            _entry("forward_by_key", _by_key(spec), by_key),
            _entry("backward_key_value", _key_value(spec), transposed),
        ]
    if united is not None:
        found.append(_entry("forward_union", _union(spec, united), united))
    return tuple(found)


def latent_entry(spec: SelectedKernelSpec, tile: Tile) -> Entry:
    """The forward for latent keys on Hopper; its mask reads no tables."""
    lines = (
        pointers(spec.dtype, "Q", "K") + _lists() + _results(spec),
        *strides("q", "k", "out"),
        sizes("lists", "units", "most", "q_heads", "n_q", "n_kv") + number("scale"),
        *mask_lines(spec.attention.mask),
        *_shared(),
    )
    return _entry("forward_latent", lines, tile)


def _entry(name: str, lines: tuple[Line, ...], tile: Tile) -> Entry:
    return Entry(name, lines, tile.options, tile)


def _forward(spec: SelectedKernelSpec, tile: Tile, yields: bool) -> tuple[Line, ...]:
    balance = pointers("int64", "BALANCE") if yields else ()
    return (
        _operands(spec, tile) + _lists() + balance + _results(spec),
        *strides("q", "k", "v", "out"),
        sizes("lists", "units", "most", "parts", "q_heads", "n_q", "n_kv") + number("scale"),
        *mask_lines(spec.attention.mask),
        *_shared(),
        *constants(PARTED=False),
    )


def _union(spec: SelectedKernelSpec, tile: Tile) -> tuple[Line, ...]:
    named = pointers("int32", "INDEX", "NAMES", "COUNT") + pointers("int64", "BALANCE")
    return (
        _operands(spec, tile) + named + _results(spec),
        *strides("q", "k", "v", "out"),
        sizes("lists", "unions", "most", "q_heads", "n_q", "n_kv") + number("scale"),
        *mask_lines(spec.attention.mask),
        *_shared(),
    )


def _merge(spec: SelectedKernelSpec) -> tuple[Line, ...]:
    parts = pointers(spec.dtype, "PART_OUT") + pointers("float32", "PART_LSE")
    return (
        parts + pointers("int32", "COUNT") + _results(spec),
        *strides("out"),
        sizes("lists", "units", "parts", "first_group", "q_heads", "n_q"),
        *constants(GROUPS_PER_LIST=1, COUNTED=True),
    )


def _query(spec: SelectedKernelSpec, tile: Tile) -> tuple[Line, ...]:
    given = pointers(spec.dtype, "OUT", "GRAD_OUT")
    statistics = pointers("float32", "LSE", "GRAD_LSE", "DELTA")
    grads = pointers(spec.dtype, "GRAD_Q") + pointers("float32", "GRAD_K", "GRAD_V")
    shape = sizes("lists", "units", "most", "parts", "q_heads", "kv_heads", "n_q", "n_kv")
    return (
        _operands(spec, tile) + _lists() + given + statistics + grads,
        *strides("q", "k", "v", "out", "grad_out"),
        shape + number("scale"),
        *mask_lines(spec.attention.mask),
        *_shared(),
        *constants(HAS_GRAD_LSE=True),
    )


def _by_key(spec: SelectedKernelSpec) -> tuple[Line, ...]:
    parts = pointers(spec.dtype, "PART_OUT") + pointers("float32", "PART_LSE")
    work = sizes("lists", "units", "most", "n_work", "first_group")
    return (
        pointers(spec.dtype, "Q", "K", "V") + pointers("int32", "WORK", "PLACES") + parts,
        *strides("q", "k", "v"),
        work + sizes("groups", "n_q", "n_kv") + number("scale"),
        *mask_lines(spec.attention.mask),
        *_shared(),
    )


def _key_value(spec: SelectedKernelSpec) -> tuple[Line, ...]:
    given = pointers("int32", "WORK", "PLACES") + pointers(spec.dtype, "GRAD_OUT")
    found = pointers("float32", "LSE", "DELTA", "GRAD_K", "GRAD_V")
    work = sizes("lists", "units", "most", "n_work", "first_group")
    return (
        pointers(spec.dtype, "Q", "K", "V") + given + found,
        *strides("q", "k", "v", "grad_out"),
        work + sizes("q_heads", "kv_heads", "n_q", "n_kv") + number("scale"),
        *mask_lines(spec.attention.mask),
        *_shared(),
    )


def _operands(spec: SelectedKernelSpec, tile: Tile) -> Line:
    """Q, K and V; the latter two may be read by the copy engine."""
    q, k, v = pointers(spec.dtype, "Q", "K", "V")
    if tile.descriptors:
        k, v = (
            replace(p, kind=Kind.DESCRIPTOR, block=(1, 1, tile.n, padded(dim)), tensor=p.name)
            for p, dim in ((k, spec.head_dim), (v, spec.value_dim))
        )
    return q, k, v


def _lists() -> Line:
    return pointers("int32", "INDEX", "COUNT")


def _results(spec: SelectedKernelSpec) -> Line:
    return pointers(spec.dtype, "OUT") + pointers("float32", "LSE")


def _shared() -> tuple[Line, ...]:
    return constants(GROUPS_PER_LIST=1, GROUPS_PER_KEY=1)

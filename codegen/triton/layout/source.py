"""From a key to the text of a Triton module that lists blocks: same key, same bytes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import sympy

from sparse_compile.codegen.entry import Entry, Kernel, Line, lists, sizes
from sparse_compile.codegen.runtime.generated import fill
from sparse_compile.codegen.triton.filled import filled
from sparse_compile.codegen.triton.layout import text
from sparse_compile.codegen.triton.layout.key import LONGEST, Key, digest
from sparse_compile.codegen.triton.layout.lookups import lookups_of, tables_entry, tables_source
from sparse_compile.codegen.triton.layout.printed import limits, printed, variable
from sparse_compile.expr.digits import digit_names
from sparse_compile.layout import extents
from sparse_compile.layout.canonical import canonical_in
from sparse_compile.layout.intervals import UNKNOWN, Span, span

_AXES = ("q", "kv")
_SCALARS = sizes("n_q", "n_kv", "heads")
#: Spans are short and lines are many: one warp a line.
_ONE_WARP = {"num_warps": 1}


def module_of(key: Key) -> Kernel:
    """The module of a key: ``list_rows``, ``fill_rows``, ``list_cols``, ``fill_cols``.

    With lookups also ``read_tables``.
    """
    name, read = f"blocks_{digest(repr((*key.identity, key.span)))}", tables_entry(key)
    rows, cols = _entries(key, "rows"), _entries(key, "cols")
    parts = [
        _header(key, name),
        *sides(key),
        tables_source(key, read) if read else "",
        verdict_text(key),
        _lines(key, rows, "q", "kv"),
        _lines(key, cols, "kv", "q"),
    ]
    entries = (*rows, *cols, *([read] if read else []))
    return Kernel(name, "".join(parts).rstrip() + "\n", entries)


def _entries(key: Key, side: str) -> tuple[Entry, Entry]:
    """The kernel that counts and lists, and the one that lists where there is room for all."""
    found = lists("counts", "start", "index") + sizes("width", "room")
    found += lists("totals", dtype="int64")
    given = lists("index", "start", "counts") + sizes("room")
    shape = _SCALARS, *_data_lines(key)
    listing = Entry(f"list_{side}", (found, *shape), _ONE_WARP)
    return listing, Entry(f"fill_{side}", (given, *shape), _ONE_WARP)


def _data_lines(key: Key) -> tuple[Line, ...]:
    """The bounds of each lookup, and the sizes."""
    found = [
        lists(name, dtype=lookup.bounds_dtype) + sizes(*others)
        for lookup in lookups_of(key)
        for name, *others in [lookup.parameters]
    ]
    return *found, sizes(*key.sizes)


def data(key: Key) -> list[str]:
    """What verdicts take besides lengths: a line for each lookup, and one for the sizes."""
    lines = [[parameter.name for parameter in line] for line in _data_lines(key)]
    return [", ".join(names) + "," for names in lines if names]


def _header(key: Key, name: str) -> str:
    symbols = [
        f"  {lookup.name:<12} bounds of t{lookup.index}({', '.join(map(str, lookup.exprs))})"
        for lookup in lookups_of(key)
    ]
    symbols += [
        f"  {f's{i}':<12} size, {'a run-time integer' if value is None else value}"
        for i, value in enumerate(key.fixed)
    ]
    divisions = text.DIVISIONS.splitlines()
    return filled(text.MODULE, key, NAME=name, SYMBOLS=symbols, DIVISIONS=divisions)


def digit_bounds(key: Key, axis: str) -> dict[str, Any]:
    """The bounds of the digits of a run of blocks by name, and ``whole``."""
    order = key.order(axis)
    n, size = variable("n", 1, LONGEST), variable("size", 1, key.span)
    # Spans beyond the last block are looked at, and left out.
    first = variable("first", 0, order.blocks(LONGEST) + key.span**2)
    ends = extents.cut(order, n, extents.digits(order, n, first, size))
    found = dict(zip(key.ends(axis), itertools.chain(*ends), strict=True))
    return {**found, "whole": extents.whole(order, n, first, size)}


def _side(key: Key, axis: str) -> str:
    blocks: Any = extents.blocks(key.order(axis), variable("n", 1, LONGEST))
    return fill(
        text.SIDE,
        AXIS=axis,
        BLOCKS=printed({"blocks": blocks}),
        DIGITS=printed(digit_bounds(key, axis)),
        RESULTS=", ".join(key.ends(axis)),
    )


def verdict_of(key: Key) -> dict[str, Any]:
    """Whether the predicate must and may hold, as code over the parameters of ``verdict``."""
    symbols: dict[str, Span] = dict(key.scalars())
    for name in ("b", "h"):
        coordinate = variable(name, 0, LONGEST)
        symbols[name] = Span(coordinate, coordinate, 0, LONGEST)
    for axis in _AXES:
        # The token itself stands in lookups only, whose bounds are those of the block.
        symbols[axis] = UNKNOWN
        bounds = digit_bounds(key, axis).items()
        ends = {end: variable(end, *limits(bound)) for end, bound in bounds}
        for name in digit_names(axis, len(key.order(axis).box)):
            symbols[name] = Span(ends[f"{name}_lo"], ends[f"{name}_hi"], 1, LONGEST + 1)
    lookups = {(lookup.index, lookup.exprs): lookup for lookup in lookups_of(key)}

    def bounded(index: int, args: Sequence[Span], exprs: Sequence[sympy.Expr]) -> Span:
        return lookups[index, tuple(exprs)].span(args)

    truth = span(canonical_in(key.mask.predicate, key.q, key.kv), symbols, bounded)
    return {"must": truth.lo, "may": truth.hi}


def sides(key: Key) -> list[str]:
    """The functions ``blocks_of_q``, ``digits_of_q`` and those of ``kv``."""
    return [_side(key, axis) for axis in _AXES]


def verdict_text(key: Key) -> str:
    """The function ``verdict``: whether the mask must, and may, hold between bounds of digits."""
    return fill(
        text.VERDICT,
        DIGITS=", ".join([*key.ends("q"), *key.ends("kv")]),
        DATA=data(key),
        LINES=printed(verdict_of(key)),
    )


def _lines(key: Key, entries: tuple[Entry, Entry], along: str, across: str) -> str:
    places = {f"{along}_at": "line", f"{across}_at": "at"}
    return fill(
        text.LINES,
        LISTS=entries[0].name.removeprefix("list_"),
        LIST_SIGNATURE=entries[0].signature,
        FILL_SIGNATURE=entries[1].signature,
        LINE=along,
        ACROSS=across,
        DIGITS_ALONG=", ".join(key.ends(along)),
        DIGITS_ACROSS=", ".join(key.ends(across)),
        DIGITS=", ".join([*key.ends("q"), *key.ends("kv")]),
        PLACES=f"{places['q_at']}, {places['kv_at']}",
        DATA=data(key),
    )

"""From a KernelSpec to the source text of its kernels: same spec, same bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sparse_compile.codegen import cache
from sparse_compile.codegen.triton import templates
from sparse_compile.codegen.triton.predicate import Printed, print_predicate
from sparse_compile.codegen.triton.tiles import Tile, padded, tiles_for
from sparse_compile.expr import KV, MaskExpr, Q, table_index
from sparse_compile.spec import KernelSpec

# A new length, layout or size must not compile anything. (Lists are views into one vector, so their
# alignment changes with the lengths.)
_UNSPECIALIZED = (
    *("start", "counts", "index", "room", "batches", "heads"),
    *("n_q", "n_kv"),
)


def kernel_source(spec: KernelSpec) -> str:
    """The module of a spec: kernels ``forward``, ``backward_query`` and ``backward_key_value``."""
    over_keys = print_predicate(spec.attention.mask, "kv")
    over_queries = print_predicate(spec.attention.mask, "q")
    tiles = tiles_for(spec)
    parts = [
        _header(spec),
        *(templates.HELPERS[name] for name in sorted(over_keys.helpers | over_queries.helpers)),
        _kernel(templates.FORWARD, spec, tiles.forward, over_keys),
        _kernel(templates.BACKWARD_QUERY, spec, tiles.backward_query, over_keys),
        _kernel(templates.BACKWARD_KEY_VALUE, spec, tiles.backward_key_value, over_queries),
    ]
    return "\n\n".join(parts)


def kernel_path(spec: KernelSpec) -> Path:
    """The file that holds :func:`kernel_source`, written if need be."""
    return cache.write_source(spec.name, kernel_source(spec))


def table_ranks(mask: MaskExpr) -> dict[int, int]:
    """The tables a predicate reads, and how many dimensions each has."""
    return {table_index(lookup): len(lookup.args) for lookup in mask.lookups}


def direct_lookups(mask: MaskExpr) -> set[tuple[int, int, str]]:
    """Where tables are indexed by a plain ``q`` or ``kv``: table, dimension, coordinate.

    The kernels then require the table to reach as far as the coordinate does.
    """
    return {
        (table_index(lookup), axis, str(arg))
        for lookup in mask.lookups
        for axis, arg in enumerate(lookup.args)
        if arg in (Q, KV)
    }


def mask_parameters(mask: MaskExpr) -> tuple[list[list[str]], list[str]]:
    """Parameters that carry a mask's run-time data: one group per table, then the sizes."""
    groups = [
        [f"t{t}", *(f"t{t}_stride{i}" for i in range(n)), *(f"t{t}_size{i}" for i in range(n))]
        for t, n in table_ranks(mask).items()
    ]
    return groups, [f"s{i}" for i in range(mask.n_sizes)]


def _header(spec: KernelSpec) -> str:
    where = [f"at       {line}" for line in spec.attention.where]
    return _fill(
        templates.HEADER,
        NAME=spec.name,
        ARCH=spec.arch,
        MASK=_escaped(str(spec.attention.mask)),
        WHERE=[*map(_escaped, where), ""],
        SYMBOLS=_legend(spec.attention.mask),
        HEAD_DIM=str(spec.head_dim),
        HEAD_PAD=str(padded(spec.head_dim)),
        VALUE_DIM=str(spec.value_dim),
        VALUE_PAD=str(padded(spec.value_dim)),
        BLOCK_Q=str(spec.attention.block_q),
        BLOCK_KV=str(spec.attention.block_kv),
        LOADED="tile.to(tl.float32)  # the interpreter cannot multiply bfloat16"
        if spec.arch == "interpreter"
        else "tile",
    )


def _escaped(text: str) -> str:
    """Text that cannot end the docstring it stands in."""
    return text.replace("\\", "/").replace('"""', "'''")


def _legend(mask: MaskExpr) -> list[str]:
    lines = [
        f"  {f't{t}':<12} table, {mask.tables[t]}, {n} dimensions"
        for t, n in table_ranks(mask).items()
    ]
    return lines + [f"  {f's{i}':<12} size, a run-time integer" for i in range(mask.n_sizes)]


def _kernel(template: str, spec: KernelSpec, tile: Tile, mask: Printed) -> str:
    tables, sizes = mask_parameters(spec.attention.mask)
    unspecialized = [
        *_UNSPECIALIZED,
        *(name for group in tables for name in group if "_size" in name),
        *sizes,
    ]
    over_queries = template is templates.BACKWARD_KEY_VALUE
    operands: tuple[_Operand | _Statistic, ...] = _OVER_QUERIES if over_queries else _OVER_KEYS
    inside, masked = list(mask.inside), []
    kept = [] if over_queries else ["(kv < n_kv)"]
    if mask.keep:
        inside.append(f"keep = {mask.keep}")
        kept.insert(0, "keep")
    if kept:
        masked.append(f'score = tl.where({" & ".join(kept)}, score, float("-inf"))')
    holes: dict[str, str | list[str]] = {}
    for operand in operands:
        holes[f"{operand.name}_BASE"] = operand.base(tile)
        holes[f"LOAD_{operand.name}"] = operand.load(tile, checked=False)
        holes[f"LOAD_{operand.name}_CHECKED"] = operand.load(tile, checked=True)
    described = dict.fromkeys(f"{operand.tensor}_TILES" for operand in operands)
    descriptors = [", ".join(described) + ",  # tensor descriptors"] if tile.descriptors else []
    return _fill(
        template,
        UNSPECIALIZED=_listed(unspecialized),
        PARAMETERS=[", ".join(group) + "," for group in [*tables, sizes] if group],
        BEFORE=list(mask.before),
        PARTIAL_RANGE=_partial_range(mask, tile),
        SHAPE=_shape(spec, tile, over_queries),
        INSIDE=inside,
        MASKED=masked,
        PRECISION=', input_precision="ieee"' if spec.dtype == "float32" else "",
        DESCRIPTORS=descriptors,
        **holes,
    )


def _partial_range(mask: Printed, tile: Tile) -> str:
    """The loop over PARTIAL blocks. Lookups in it are pipelined too: room for them must come from
    somewhere, or fewer programs fit a multiprocessor."""
    looks_up = any("tl.load" in line for line in mask.inside)
    if looks_up and tile.stages > 2:
        return f"tl.range(0, n_partial * STEPS, num_stages={tile.stages - 1})"
    return "range(0, n_partial * STEPS)"


def _shape(spec: KernelSpec, tile: Tile, over_queries: bool) -> list[str]:
    attention = spec.attention
    steps = attention.block_q // tile.m if over_queries else attention.block_kv // tile.n
    return [
        f"TILE_M: tl.constexpr = {tile.m}  # {tile.warps} warps, {tile.stages} stages",
        f"TILE_N: tl.constexpr = {tile.n}",
        f"STEPS: tl.constexpr = {steps}  # tiles to a block",
    ]


def _listed(names: list[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


@dataclass(frozen=True)
class _Operand:
    """A matrix whose tiles a loop reads.

    Attributes:
        name: parameter that holds it.
        dim: which of the feature dimensions it has.
        head: which of its heads a program reads.
        first, n, tile: first row of a tile, number of rows, rows of a tile.
    """

    name: str
    dim: str
    head: str
    first: str
    n: str
    tile: str

    @property
    def tensor(self) -> str:
        """Parameter that holds it."""
        return self.name

    def base(self, tile: Tile) -> list[str]:
        """Lines before the loop."""
        if tile.descriptors:
            return []
        strides = f"{self.name.lower()}_stride_b, {self.name.lower()}_stride_h"
        return [f"{self.name}_HEAD = head({self.name}, b, {self.head}, {strides})"]

    def load(self, tile: Tile, checked: bool) -> str:
        """Expression for a tile."""
        if tile.descriptors:
            where, shape = f"[b, {self.head}, {self.first}, 0]", f"[{self.tile}, {self.dim}_PAD]"
            return f"{self.name}_TILES.load({where}).reshape({shape})"
        rows = f"{self.first}, {self.n}, {self.name.lower()}_stride_n, {self.tile}"
        return f"load_tile({self.name}_HEAD, {rows}, {self.dim}_DIM, {self.dim}_PAD, {checked})"


@dataclass(frozen=True)
class _Statistic:
    """A number per query that a loop over queries reads; STATISTICS holds one after another.

    Attributes:
        name: what it is called.
        number: which statistic it is.
    """

    name: str
    number: int
    tensor: str = "STATISTICS"

    def base(self, tile: Tile) -> list[str]:
        """Lines before the loop."""
        if tile.descriptors:
            return []
        row = f"({self.number} * tl.num_programs(2) + b) * tl.num_programs(1) * GROUP + h"
        rows = "tl.cdiv(n_q, BLOCK_Q).to(tl.int64) * BLOCK_Q"
        return [f"{self.name} = STATISTICS + ({row}) * ({rows})"]

    def load(self, tile: Tile, checked: bool) -> str:
        """Expression for those of a tile. They exist for whole blocks: nothing to check."""
        if tile.descriptors:
            return f"STATISTICS_TILES.load([{self.number}, b, h, q0]).reshape([TILE_M])"
        return f"tl.load({self.name} + rows)"


_OVER_KEYS = (
    _Operand("K", "HEAD", "h // GROUP", "kv0", "n_kv", "TILE_N"),
    _Operand("V", "VALUE", "h // GROUP", "kv0", "n_kv", "TILE_N"),
)
_OVER_QUERIES = (
    _Operand("Q", "HEAD", "h", "q0", "n_q", "TILE_M"),
    _Operand("GRAD_OUT", "VALUE", "h", "q0", "n_q", "TILE_M"),
    _Statistic("LSE", 0),
    _Statistic("DELTA", 1),
)


def _fill(template: str, **holes: str | list[str]) -> str:
    """The template with its holes filled; a list fills whole lines, indented like the hole."""

    def filled(match: re.Match[str]) -> str:
        indent, alone, inline = match.groups()
        if inline:
            return str(holes[inline])
        value = holes[alone]
        block = [value] if isinstance(value, str) else value
        return "".join(f"{indent}{line}".rstrip() + "\n" for line in block)

    # One pass, so that what fills a hole is never searched for holes.
    return re.sub(r"^( *)\$([A-Z_]+)\n|\$([A-Z_]+)", filled, template, flags=re.MULTILINE)

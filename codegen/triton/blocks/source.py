"""From a KernelSpec to the source text of its kernels: same spec, same bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sparse_compile.codegen.entry import Entry, Kernel
from sparse_compile.codegen.runtime.generated import fill, write_source
from sparse_compile.codegen.triton.blocks.operands import (
    OVER_KEYS,
    OVER_QUERIES,
    Operand,
    Statistic,
)
from sparse_compile.codegen.triton.blocks.sections import (
    Blocks,
    Lines,
    Section,
    descriptors_usable,
    first_token_functions,
    sections_of,
    title,
)
from sparse_compile.codegen.triton.blocks.tiles import Tile, padded, tiles_for
from sparse_compile.codegen.triton.entries import entries_of, table_ranks
from sparse_compile.codegen.triton.predicate import Printed, print_predicate
from sparse_compile.codegen.triton.score import PrintedScore, print_score
from sparse_compile.codegen.triton.text import backward, common, forward, loops, merge
from sparse_compile.expr import KV, MaskExpr, Q, table_index
from sparse_compile.spec import KernelSpec


@dataclass(frozen=True)
class _Kernel:
    """One of the three kernels that loop over blocks.

    Attributes:
        name: of its function.
        text, section, step: its templates; a step is what it does with a block.
        start: what the first section and later ones accumulate from.
        earlier: what later ones add at the end.
        lines: side of the tile that a program holds; it loops over the other side.
        operands: what the loop reads.
    """

    name: str
    text: str
    section: str
    step: str
    start: tuple[str, str]
    earlier: str = field(default="", kw_only=True)
    lines: str
    operands: tuple[Operand | Statistic, ...]

    @property
    def across(self) -> str:
        """Side that the loop runs over."""
        return "kv" if self.lines == "q" else "q"


_FORWARD = _Kernel(
    name="forward",
    text=forward.KERNEL,
    section=forward.SECTION,
    step=forward.STEP,
    start=(forward.START, forward.CONTINUE),
    lines="q",
    operands=OVER_KEYS,
)
_QUERY = _Kernel(
    name="backward_query",
    text=backward.QUERY,
    section=backward.QUERY_SECTION,
    step=backward.QUERY_STEP,
    start=(backward.QUERY_START, backward.QUERY_CONTINUE),
    lines="q",
    operands=OVER_KEYS,
)
_KEY_VALUE = _Kernel(
    name="backward_key_value",
    text=backward.KEY_VALUE,
    section=backward.KEY_VALUE_SECTION,
    step=backward.KEY_VALUE_STEP,
    start=(backward.KEY_VALUE_START, backward.KEY_VALUE_START),
    earlier=backward.KEY_VALUE_EARLIER,
    lines="kv",
    operands=OVER_QUERIES,
)


@dataclass(frozen=True)
class _Scoring:
    """The source of what happens to the products of one view before the softmax."""

    score: PrintedScore
    mask: Printed

    @property
    def helpers(self) -> frozenset[str]:
        return self.score.helpers | self.mask.helpers

    @staticmethod
    def of(spec: KernelSpec, mask: MaskExpr, loop_axis: str) -> _Scoring:
        printed = print_predicate(mask, loop_axis)
        score = print_score(spec.attention.score, mask.tables, loop_axis, printed)
        return _Scoring(score, printed)


def kernel_of(spec: KernelSpec) -> Kernel:
    """The module of a spec: ``forward``, ``backward_*`` and the kernels that merge."""
    tiles = tiles_for(spec)
    entries = entries_of(spec, tiles)
    entry = {one.name: one for one in reversed(entries)}
    masks = [spec.attention.part_mask(view) for view in spec.attention.parts]
    over_keys = [_Scoring.of(spec, mask, "kv") for mask in masks]
    over_queries = [_Scoring.of(spec, mask, "q") for mask in masks]
    printed = [
        one for scoring in (*over_keys, *over_queries) for one in (scoring.score, scoring.mask)
    ]
    helpers = frozenset().union(*(one.helpers for one in printed))
    parts = [
        _header(spec, over_keys[0].score),
        *(common.HELPERS[name] for name in sorted(helpers)),
        *first_token_functions(spec.attention),
        _kernel(_FORWARD, entry["forward"], spec, over_keys),
        _merge(merge.FORWARD, entry["merge_forward"], spec, tiles.forward, "q"),
        _kernel(_QUERY, entry["backward_query"], spec, over_keys),
        _merge(merge.SUM, entry["merge_query"], spec, tiles.backward_query, "q"),
        _kernel(_KEY_VALUE, entry["backward_key_value"], spec, over_queries),
        _merge(merge.SUM, entry["merge_key_value"], spec, tiles.backward_key_value, "kv"),
    ]
    return Kernel(spec.name, "\n\n".join(parts), entries)


def kernel_source(spec: KernelSpec) -> str:
    """The text of :func:`kernel_of`."""
    return kernel_of(spec).source


def kernel_path(spec: KernelSpec) -> Path:
    """The file that holds :func:`kernel_source`, written if need be."""
    return write_source(spec.name, kernel_source(spec))


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


def _header(spec: KernelSpec, score: PrintedScore) -> str:
    where = [f"at       {line}" for line in spec.attention.where]
    views = [f"view {v}   {view.predicate}" for v, view in enumerate(spec.attention.views)]
    return fill(
        common.HEADER,
        NAME=spec.name,
        ARCH=spec.arch,
        PROGRAM=[escaped(line) for line in score.shown],
        MASK=escaped(str(spec.attention.mask)),
        VIEWS=[escaped(line) for line in views],
        WHERE=[*map(escaped, where), ""],
        SYMBOLS=legend(spec.attention.mask),
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


def escaped(text: str) -> str:
    """Text that cannot end the docstring it stands in."""
    return text.replace("\\", "/").replace('"""', "'''")


def legend(mask: MaskExpr) -> list[str]:
    """Lines that say what the tables and sizes of a mask are."""
    lines = [
        f"  {f't{t}':<12} table, {mask.tables[t]}, {n} dimensions"
        for t, n in table_ranks(mask).items()
    ]
    return lines + [f"  {f's{i}':<12} size, a run-time integer" for i in range(mask.n_sizes)]


def _kernel(kernel: _Kernel, entry: Entry, spec: KernelSpec, scorings: list[_Scoring]) -> str:
    tile: Tile = entry.tile
    sections = sections_of(spec.attention, kernel.lines)
    bodies = [_section(kernel, spec, tile, scorings, section) for section in sections]
    return entry.text(
        kernel.text,
        SHAPE=_shape(spec, tile, kernel.lines),
        FACTOR=scorings[0].score.factor,
        SECTIONS=_dispatched(bodies),
        **_operand_bases(kernel, spec, tile),
    )


def _operand_bases(kernel: _Kernel, spec: KernelSpec, tile: Tile) -> dict[str, list[str]]:
    """Lines that find the head of each operand, where some view loads it by pointers."""
    views = spec.attention.parts
    pointers = not all(descriptors_usable(spec, v, kernel.across, tile) for v in views)
    return {
        f"{operand.name}_BASE": operand.base() if pointers else [] for operand in kernel.operands
    }


def _dispatched(bodies: list[str]) -> list[str]:
    """The bodies one after another, each for its section."""
    if len(bodies) == 1:
        return bodies[0].splitlines()
    lines: list[str] = []
    for number, body in enumerate(bodies):
        lines += [f"if SECTION == {number}:", *(f"    {line}" for line in body.splitlines()), ""]
    return lines[:-1]


def _section(
    kernel: _Kernel,
    spec: KernelSpec,
    tile: Tile,
    scorings: list[_Scoring],
    section: Section,
) -> str:
    extent = tile.m if kernel.lines == "q" else tile.n
    views = [
        _view(kernel, spec, tile, scorings[v], v, v == section.views[0]) for v in section.views
    ]
    lines = Lines(section, kernel.lines, extent).holes
    start = fill(kernel.start[section.number > 0], WIDE=lines["WIDE"]).splitlines()
    earlier = fill(kernel.earlier, WIDE=lines["WIDE"]).splitlines() if section.number else []
    # The first section computes the statistics of its queries; if it has them all, it is the last.
    first = sections_of(spec.attention, kernel.lines)[0]
    known = section.number > 0 and first.order.is_complete
    load = backward.LOAD_KNOWN if known else backward.LOAD_STATISTICS
    statistics = "" if known else backward.STATISTICS
    return fill(
        kernel.section,
        TITLE=f"Section {section.number}: blocks of "
        f"{'queries' if kernel.lines == 'q' else 'keys'} in {section.order}.",
        LISTS=[line for v in section.views for line in _lists(kernel, spec, v)],
        FIRST_BLOCK=fill(loops.FIRST_BLOCK, V=str(section.views[0])).splitlines(),
        VIEWS="\n\n".join(views).splitlines(),
        START=start,
        EARLIER=earlier,
        LOAD_STATISTICS=fill(load, WIDE=lines["WIDE"]).splitlines(),
        STATISTICS=fill(statistics, WIDE=lines["WIDE"]).splitlines(),
        **lines,
        **_operand_bases(kernel, spec, tile),
    )


def _lists(kernel: _Kernel, spec: KernelSpec, number: int) -> list[str]:
    """Lines that find the lists of a line of a view."""
    own = ""
    if kernel.lines == "kv" and spec.attention.parts[number].listed:
        member = f"((b % batches_{number}) * heads_{number} + h % heads_{number})"
        own = f" + {member} * (lines_{number} + 1)"
    return fill(loops.LISTS, V=str(number), OWN=own).splitlines()


def _view(
    kernel: _Kernel, spec: KernelSpec, tile: Tile, scoring: _Scoring, number: int, is_first: bool
) -> str:
    view = spec.attention.parts[number]
    order, extent = (view.kv, tile.n) if kernel.across == "kv" else (view.q, tile.m)
    described = descriptors_usable(spec, view, kernel.across, tile)
    blocks = Blocks(number, order, kernel.across, extent, described, is_first)
    holes: dict[str, str | list[str]] = blocks.holes()
    score, mask = scoring.score, scoring.mask
    coordinates = f"{kernel.across} = {holes['KV']}[None, :]"
    lines = score.value if kernel is _FORWARD else score.slope
    masking = _masking(kernel, mask, coordinates)
    if masking:
        masking = [f"if i < n_partial_{number} * STEPS:", *(f"    {line}" for line in masking)]
    step = fill(
        kernel.step,
        SCORE=[*([coordinates] if kernel.across in score.coordinates else []), *lines],
        SLOPE=score.apply_slope,
        MASK=masking,
        PRECISION=', input_precision="ieee"' if spec.dtype == "float32" else "",
        **{f"LOAD_{operand.name}": operand.load(blocks) for operand in kernel.operands},
    )
    return fill(
        loops.VIEW,
        TITLE=title(view, number, len(spec.attention.parts)),
        BEFORE=[*mask.before, *score.before],
        STEP=step.splitlines(),
        **holes,
    )


def _masking(kernel: _Kernel, mask: Printed, coordinates: str) -> list[str]:
    """Lines that leave out of the scores of a tile what the mask does not allow."""
    kept = ["keep"] if mask.keep else []
    if kernel.across == "kv":
        kept.append("(kv < n_kv)")
    if not kept:
        return []
    keep = [f"keep = {mask.keep}"] if mask.keep else []
    score = f'score = tl.where({" & ".join(kept)}, score, float("-inf"))'
    return [coordinates, *mask.inside, *keep, score]


def _shape(spec: KernelSpec, tile: Tile, lines: str) -> list[str]:
    attention = spec.attention
    counts = {"q": attention.block_q // tile.m, "kv": attention.block_kv // tile.n}
    across = "kv" if lines == "q" else "q"
    return [
        f"TILE_M: tl.constexpr = {tile.m}  # {tile.warps} warps, {tile.stages} stages",
        f"TILE_N: tl.constexpr = {tile.n}",
        f"STEPS: tl.constexpr = {counts[across]}  # tiles to a block of the loop",
        f"SUBTILES: tl.constexpr = {counts[lines]}  # programs to a line",
    ]


def _merge(template: str, entry: Entry, spec: KernelSpec, tile: Tile, lines: str) -> str:
    """A kernel that merges the parts of split lines; their rows follow from the section."""
    extent = tile.m if lines == "q" else tile.n
    rows: list[str] = []
    sections = sections_of(spec.attention, lines)
    for section in sections:
        holes = Lines(section, lines, extent).holes
        body = [f"first = {holes['FIRST']}", f"row = {holes['ROW']}"]
        if len(sections) > 1:
            body = [f"if SECTION == {section.number}:", *(f"    {line}" for line in body)]
        rows += body
    return entry.text(
        template,
        AXIS=lines,
        SHAPE=[*_shape(spec, tile, lines), f"TILE: tl.constexpr = {extent}"],
        ROWS=rows,
    )

"""From a KernelSpec to the source text of its kernels: same spec, same bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sparse_compile.codegen.entry import Entry, Kernel
from sparse_compile.codegen.runtime.generated import fill
from sparse_compile.codegen.triton.blocks.learned import Sums, lines_of, looked_up
from sparse_compile.codegen.triton.blocks.sections import (
    OVER_KEYS,
    OVER_QUERIES,
    Blocks,
    Operand,
    Section,
    Statistic,
    across,
    described_box,
    first_token_functions,
    order_of,
    sections_of,
    title,
)
from sparse_compile.codegen.triton.blocks.tiles import tiles_for
from sparse_compile.codegen.triton.dropped import dropped
from sparse_compile.codegen.triton.entries import axis_of, entries_of, merge_of
from sparse_compile.codegen.triton.filled import escaped, head, precision
from sparse_compile.codegen.triton.score import PrintedScore, Scoring
from sparse_compile.codegen.triton.text import (
    common,
    forward,
    key_value,
    learned,
    loops,
    merge,
    query,
)
from sparse_compile.codegen.triton.tile import Tile
from sparse_compile.expr import KV, Q, table_index
from sparse_compile.spec import AttentionSpec, KernelSpec
from sparse_compile.spec.view import View


class _Texts(Protocol):
    """The templates of a kernel; ``STEP`` is what it does with a block.

    The first section accumulates from ``START`` and later ones from ``CONTINUE``, which add
    ``EARLIER`` at the end; ``STORE`` is where some write their results.
    """

    KERNEL: str
    SECTION: str
    STEP: str
    START: str
    CONTINUE: str
    EARLIER: str
    STORE: str


@dataclass(frozen=True)
class _Kernel:
    """One of the three kernels that loop over blocks.

    Attributes:
        name: of its function.
        texts: its templates.
        merge: template of the kernel that merges what it leaves of split lines.
        operands: what the loop reads.
    """

    name: str
    texts: _Texts
    merge: str
    operands: tuple[Operand | Statistic, ...]

    @property
    def lines(self) -> str:
        """Side of the tile that a program holds; it loops over the other side."""
        return axis_of(self.name)


_KERNELS = (
    _Kernel("forward", forward, merge.FORWARD, OVER_KEYS),
    _Kernel("backward_query", query, merge.SUM, OVER_KEYS),
    _Kernel("backward_key_value", key_value, merge.SUM, OVER_QUERIES),
)
_LEARNED = _Kernel("backward_learned", learned, "", OVER_KEYS)


def kernel_of(spec: KernelSpec) -> Kernel:
    """The module of a spec: ``forward``, ``backward_*`` and the kernels that merge."""
    entries = entries_of(spec, tiles_for(spec))
    entry = {one.name: one for one in reversed(entries)}
    attention = spec.attention
    scorings = {axis: _scorings(attention, axis) for axis in ("kv", "q")}
    by_learned = _scorings(attention, "kv", learned=True)
    every = [one for over in (*scorings.values(), by_learned) for one in over]
    helpers = frozenset().union(*(one.helpers for one in every))
    if any(one.sums is Sums.DISTANCES for one in looked_up(attention)):
        helpers |= {"roll_rows"}
    if attention.dropout is not None:
        helpers |= {"mixed", "stays"}
    views = [f"view {v}   {view.predicate}" for v, view in enumerate(attention.views)]
    parts = head(
        common.HEADER,
        spec,
        scorings["kv"][0].score,
        helpers,
        VIEWS=[escaped(line) for line in views],
        BLOCK_Q=str(attention.block_q),
        BLOCK_KV=str(attention.block_kv),
    )
    parts += first_token_functions(attention)
    for kernel in _KERNELS:
        own = entry[kernel.name]
        text = _Text(kernel, spec, own.tile, scorings[across(kernel.lines)])
        parts += [text.kernel(own), text.merge(entry[merge_of(kernel.name)])]
    if _LEARNED.name in entry:
        own = entry[_LEARNED.name]
        parts.append(_Text(_LEARNED, spec, own.tile, by_learned).kernel(own))
        parts.append(entry["merge_learned"].text(merge.LEARNED))
    return Kernel(spec.name, "\n\n".join(parts), entries)


def _scorings(attention: AttentionSpec, loop_axis: str, learned: bool = False) -> list[Scoring]:
    """What becomes of the products of a tile, in each view."""
    return [
        Scoring.of(
            attention,
            attention.part_mask(view),
            loop_axis,
            learned,
            tiled=view.is_natural,
        )
        for view in attention.parts
    ]


def direct_lookups(spec: AttentionSpec) -> set[tuple[int, int, str]]:
    """Where tables are indexed by a plain ``q`` or ``kv``: table, dimension, coordinate.

    The kernels then require the table to reach as far as the coordinate does.
    """
    of_score = () if spec.score is None else spec.score.table_lookups
    return {
        (table_index(lookup), axis, str(arg))
        for lookup in (*spec.mask.lookups, *of_score)
        for axis, arg in enumerate(lookup.args)
        if arg in (Q, KV)
    }


@dataclass(frozen=True)
class _Text:
    """Source of one of the kernels of a spec, and of the one that merges its parts.

    Attributes:
        scorings: of each view, for a loop over the other side.
    """

    definition: _Kernel
    spec: KernelSpec
    tile: Tile
    scorings: list[Scoring]

    @property
    def lines(self) -> str:
        """Side of the tile that a program holds."""
        return self.definition.lines

    @property
    def sections(self) -> tuple[Section, ...]:
        """What launches work through."""
        return sections_of(self.spec.attention, self.lines)

    def kernel(self, entry: Entry) -> str:
        """The kernel."""
        bodies = [self._section(section).splitlines() for section in self.sections]
        return entry.text(
            self.definition.texts.KERNEL,
            SHAPE=self._shape(),
            FACTOR=self.scorings[0].score.factor,
            BUFFERS=self._buffers(),
            SECTIONS=self._dispatched(bodies, [""]),
            **self._operand_bases(),
        )

    def merge(self, entry: Entry) -> str:
        """What merges the parts of split lines; their rows follow from the section."""
        extent = self.tile.extent(self.lines)
        found = [section.holes(extent) for section in self.sections]
        rows = [[f"first = {holes['FIRST']}", f"row = {holes['ROW']}"] for holes in found]
        return entry.text(
            self.definition.merge,
            AXIS=self.lines,
            SHAPE=[*self._shape(), f"TILE: tl.constexpr = {extent}"],
            ROWS=self._dispatched(rows, []),
        )

    def _buffers(self) -> list[str]:
        """What the kernel of learned tensors leaves, in words."""
        if self.definition is not _LEARNED:
            return []
        return [
            f"SUM_{one.number}: by {one.lookup}, {one.sums.name.lower()}"
            for one in looked_up(self.spec.attention)
        ]

    def _shape(self) -> list[str]:
        attention, tile = self.spec.attention, self.tile
        counts = {"q": attention.block_q // tile.m, "kv": attention.block_kv // tile.n}
        return [
            f"TILE_M: tl.constexpr = {tile.m}  # {tile.warps} warps, {tile.stages} stages",
            f"TILE_N: tl.constexpr = {tile.n}",
            f"STEPS: tl.constexpr = {counts[across(self.lines)]}  # tiles to a block of the loop",
            f"SUBTILES: tl.constexpr = {counts[self.lines]}  # programs to a line",
        ]

    @staticmethod
    def _dispatched(bodies: list[list[str]], between: list[str]) -> list[str]:
        """The bodies one after another, each for its section if there are several."""
        if len(bodies) == 1:
            return bodies[0]
        lines: list[str] = []
        for number, body in enumerate(bodies):
            lines += between if number else []
            lines += [f"if SECTION == {number}:", *(f"    {line}" for line in body)]
        return lines

    def _described(self, view: View) -> bool:
        """Whether the tiles of a view are loaded by tensor descriptors."""
        return described_box(self.spec, view, across(self.lines), self.tile) is not None

    def _operand_bases(self) -> dict[str, list[str]]:
        """Lines that find the head of each operand, where some view loads it by pointers."""
        pointers = not all(map(self._described, self.spec.attention.parts))
        return {
            f"{operand.name}_BASE": operand.base() if pointers else []
            for operand in self.definition.operands
        }

    def _section(self, section: Section) -> str:
        texts, first_view = self.definition.texts, section.views[0]
        views = [self._view(v, v == first_view) for v in section.views]
        is_later = section.number > 0
        # The first section computes the statistics of its queries; if it has them all, it is the
        # last.
        known = is_later and self.sections[0].order.is_complete
        holes = section.holes(self.tile.extent(self.lines))
        parts = {
            "START": texts.CONTINUE if is_later else texts.START,
            "EARLIER": texts.EARLIER if is_later else "",
            "LOAD_STATISTICS": query.LOAD_KNOWN if known else query.LOAD_STATISTICS,
            "STATISTICS": "" if known else query.STATISTICS,
            "STORE": texts.STORE,
        }
        return fill(
            texts.SECTION,
            TITLE=f"Section {section.number}: blocks of "
            f"{'queries' if self.lines == 'q' else 'keys'} in {section.order}.",
            LISTS=[line for v in section.views for line in self._lists(v)],
            FIRST_BLOCK=fill(loops.FIRST_BLOCK, V=str(first_view)).splitlines(),
            VIEWS="\n\n".join(views).splitlines(),
            **{
                n: [*fill(text, WIDE=holes["WIDE"]).splitlines(), *self._learned(n)]
                for n, text in parts.items()
            },
            **holes,
            **self._operand_bases(),
        )

    def _is_placed(self, score: PrintedScore, axis: str) -> bool:
        """Whether a step needs the coordinates of its tile, however FULL the block is."""
        attention = self.spec.attention
        return axis in score.coordinates or bool(attention.dropout or self.definition is _LEARNED)

    def _distances(self) -> str:
        """Line that says which distances there are in a tile; for lines of keys the highest first.

        They are a few more than that, a power of two.
        """
        places = f"tl.arange(0, {2 * max(self.tile.m, self.tile.n)})"
        if self.lines == "q":
            return f"distance = kv0 - first - (TILE_M - 1) + {places}"
        return f"distance = first - q0 + (TILE_N - 1) - {places}"

    def _drop(self) -> dict[str, list[str] | str]:
        """What drops weights, or the gradients of those that were dropped."""
        dropout, by_key = self.spec.attention.dropout, self.lines == "kv"
        if not by_key:
            is_forward = self.definition.name == "forward"
            return {"DROP": dropped(dropout, "weight" if is_forward else "grad_weight")}
        if dropout is None:
            return {"DROP": [], "KEPT": "weight", "DROP_GRAD": []}
        stay, grad = dropped(dropout, "grad_weight")
        kept = f"kept = tl.where(stay, weight * {dropout.factor!r}, 0.0)"
        return {"DROP": [stay, kept], "KEPT": "kept", "DROP_GRAD": [grad]}

    def _between(self, is_first: bool) -> list[str]:
        """What stands before a view: sums over keys are added to those of earlier views."""
        several = self.definition is _LEARNED and not is_first
        return ["tl.debug_barrier()"] if several else []

    def _learned(self, hole: str) -> list[str]:
        """What the kernel of learned tensors has in a hole beside what others have there."""
        if self.definition is not _LEARNED:
            return []
        return lines_of(looked_up(self.spec.attention)).get(hole, [])

    def _lists(self, number: int) -> list[str]:
        """Lines that find the lists of a line of a view."""
        own = ""
        if self.lines == "kv" and self.spec.attention.parts[number].listed:
            member = f"((b % batches_{number}) * heads_{number} + h % heads_{number})"
            own = f" + {member} * (lines_{number} + 1)"
        return fill(loops.LISTS, V=str(number), OWN=own).splitlines()

    def _view(self, number: int, is_first: bool) -> str:
        kernel, axis, parts = self.definition, across(self.lines), self.spec.attention.parts
        view, scoring = parts[number], self.scorings[number]
        order, extent = order_of(view, axis), self.tile.extent(axis)
        blocks = Blocks(number, order, axis, extent, self._described(view), is_first)
        holes, score = blocks.holes(), scoring.score
        coordinates = f"{axis} = {holes['KV']}[None, :]"
        masking = scoring.mask.masking(*(["(kv < n_kv)"] if axis == "kv" else []))
        if masking:
            partly = [f"    {line}" for line in (coordinates, *masking)]
            masking = [f"if i < n_partial_{number} * STEPS:", *partly]
        step = fill(
            kernel.texts.STEP,
            SCORE=[
                *([coordinates] if self._is_placed(score, axis) else []),
                *([self._distances()] if score.by_distance else []),
                *(score.value if kernel.name == "forward" else score.slope),
            ],
            SLOPE=score.apply_slope,
            **self._drop(),
            LEARNED=self._learned("LEARNED"),
            MASK=masking,
            PRECISION=precision(self.spec),
            **{f"LOAD_{operand.name}": operand.load(blocks) for operand in kernel.operands},
        )
        return fill(
            loops.VIEW,
            TITLE=title(view, number, len(parts)),
            BEFORE=[*self._between(is_first), *scoring.before],
            STEP=step.splitlines(),
            **holes,
        )

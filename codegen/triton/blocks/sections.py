"""Sections and loops of the kernels: which views a program works through, and what it reads.

A *section* holds the views with the same order on the side of the lines: a program loads its tile
once and goes through the blocks of each of these views in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparse_compile.codegen.triton.tile import Tile
from sparse_compile.spec import AttentionSpec, KernelSpec
from sparse_compile.spec.view import Order, View


def across(axis: str) -> str:
    """The other of the sides ``"q"`` and ``"kv"``."""
    return "kv" if axis == "q" else "q"


def order_of(view: View, axis: str) -> Order:
    """How a view puts the tokens of a side into blocks."""
    return view.q if axis == "q" else view.kv


@dataclass(frozen=True)
class Section:
    """The views that one program works through.

    Attributes:
        number: of the section.
        axis: side of the lines, ``"q"`` or ``"kv"``.
        order: of the lines.
        views: numbers of the views, in order.
    """

    number: int
    axis: str
    order: Order
    views: tuple[int, ...]

    def holes(self, extent: int) -> dict[str, str]:
        """``FIRST``, ``ROW`` and ``WIDE``, for programs that hold so many tokens."""
        tile = tile_name(self.axis)
        place = f"tl.arange(0, {tile})"
        if self.order.is_natural:
            return {
                "FIRST": f"number * {self.order.block} + sub * {tile}",
                "ROW": place,
                "WIDE": "",
            }
        if extent < self.order.block:
            place = f"sub * {tile} + {place}"
        first = f"first_{self.axis}_{self.views[0]}(number, n_{self.axis})"
        return {"FIRST": first, "ROW": offset_text(self.order, place), "WIDE": ".to(tl.int64)"}


def tile_name(axis: str) -> str:
    """What the extent of a tile along a side is called."""
    return "TILE_M" if axis == "q" else "TILE_N"


def sections_of(spec: AttentionSpec, axis: str) -> tuple[Section, ...]:
    """The sections of a kernel whose lines are blocks of ``axis``, ``"q"`` or ``"kv"``.

    >>> from sparse_compile.expr import KV, MaskExpr, Q
    >>> [section.views for section in sections_of(AttentionSpec(MaskExpr(KV <= Q)), "q")]
    [(0,)]
    """
    return tuple(
        Section(number, axis, order_of(spec.parts[views[0]], axis), views)
        for number, views in enumerate(spec.sections(axis))
    )


def first_token_functions(spec: AttentionSpec) -> list[str]:
    """Functions ``first_{q|kv}_{view}`` that find the first token of a block of an order."""
    return [
        first_token_function(f"first_{axis}_{number}", order)
        for number, view in enumerate(spec.parts)
        for axis, order in (("q", view.q), ("kv", view.kv))
        if not order.is_natural
    ]


def first_token_function(name: str, order: Order) -> str:
    '''Source of :meth:`Order.base`, as a function of the block and the number of tokens.

    >>> print(first_token_function("first_q_1", Order((64, 1), (128,), (1, 0))))
    @triton.jit
    def first_q_1(block, n):
        """The first token of a block, of boxes of 64 x 1 over radix 128."""
        count = (n + 8191) // 8192
        return block % count * 8192 + block // count
    <BLANKLINE>
    '''
    slowest, counts = order.nesting[0], ["count", *map(str, order.counts(1)[1:])]
    starts = [0, *(low for low, _ in order.windows)]
    block, terms = "block", []
    for k in reversed(order.nesting):
        step, start = order.box[k] * order.strides[k], starts[k] * order.strides[k]
        place = block if k == slowest else f"{block} % {counts[k]}"
        if k == slowest or counts[k] != "1":
            terms.append(place if step == 1 else f"{place} * {step}")
        terms += [str(start)] * (start > 0)
        block = block if counts[k] == "1" else f"{block} // {counts[k]}"
    unit = order.box[0] * order.strides[0]
    return "\n".join(
        [
            "@triton.jit",
            f"def {name}(block, n):",
            f'    """The first token of a block, of {order}."""',
            *([] if slowest == 0 else [f"    count = (n + {unit - 1}) // {unit}"]),
            f"    return {' + '.join(terms)}",
            "",
        ]
    )


def offset_text(order: Order, x: str) -> str:
    """Source of the token that stands at place ``x`` of a block, counted from its first one.

    >>> offset_text(Order((8, 8), (128,), (0, 1), ((120, 128),)), "x")
    'x // 8 * 128 + x % 8'
    >>> offset_text(Order((64, 1), (128,), (1, 0)), "x"), offset_text(Order((4,)), "x")
    ('x * 128', 'x')
    """
    terms, inner = [], order.block
    name = x if x.isidentifier() else f"({x})"
    for extent, stride in zip(order.box, order.strides, strict=True):
        outer, inner = inner, inner // extent
        if extent == 1:
            continue
        text = name if inner == 1 else f"{name} // {inner}"
        if outer != order.block:
            text = f"{text} % {extent}"
        terms.append(text if stride == 1 else f"{text} * {stride}")
    return " + ".join(terms) or f"{name} * 0"


@dataclass(frozen=True)
class Blocks:
    """The holes of a loop over the blocks of a view.

    Attributes:
        number: of the view.
        order: of the blocks.
        axis: side of the blocks, ``"q"`` or ``"kv"``.
        tile: tokens of a tile.
        described: whether tiles are loaded by tensor descriptors.
        is_first: whether the view is the first of its section.
    """

    number: int
    order: Order
    axis: str
    tile: int
    described: bool
    is_first: bool

    @property
    def row(self) -> str:
        """Source of the rows of a tile, counted from its first token, for loads."""
        return self._places if self.order.is_natural else f"{self.axis}_row.to(tl.int64)"

    @property
    def suffix(self) -> str:
        """What tells the descriptors of this view from those of others."""
        return "" if self.order.is_natural else f"_{self.number}"

    @property
    def digits(self) -> str:
        """Source of the first digits of a tile, for loads by descriptors."""
        first, steps = f"{self.axis}0", self.order.block // self.tile
        if self.order.is_natural:
            return first
        outer = f"{first} // {self.order.strides[0]}"
        if steps > 1:
            outer += f" + i % STEPS * {self.order.box[0] // steps}"
        return f"{outer}, {first} % {self.order.strides[0]}"

    @property
    def _places(self) -> str:
        return f"tl.arange(0, {tile_name(self.axis)})"

    def holes(self) -> dict[str, str | list[str]]:
        """Where blocks begin, the tile of a step, and its tokens."""
        entry = f"block_at(blocks_{self.number}, %s, n_blocks_{self.number})"
        begin = f"first_block_{self.number}" if self.is_first else entry % "begin"
        first, name, place = f"{self.axis}0", tile_name(self.axis), self._places
        holes: dict[str, str | list[str]] = {
            "V": str(self.number),
            "BEGIN": self._base(begin),
            "NEXT": self._base(entry % "(i + 1) // STEPS"),
        }
        if self.order.is_natural:
            where = [f"{first} = base + i % STEPS * {name}"]
            return {**holes, "WHERE": where, "KV": f"({first} + {place})"}
        if self.tile < self.order.block:
            place = f"i % STEPS * {name} + {place}"
        where = [f"{first} = base", f"{self.axis}_row = {offset_text(self.order, place)}"]
        if self.axis == "q":
            where.append(f"q_at = block * BLOCK_Q + i % STEPS * {name}")
        return {**holes, "WHERE": where, "KV": f"({first} + {self.axis}_row)"}

    def _base(self, block: str) -> list[str]:
        if self.order.is_natural:
            return [f"base = {block} * {self.order.block}"]
        return [f"block = {block}", f"base = first_{self.axis}_{self.number}(block, n_{self.axis})"]


@dataclass(frozen=True)
class Operand:
    """A matrix whose tiles a loop reads.

    Attributes:
        name: parameter that holds it.
        dim: which of the feature dimensions it has.
        head: which of its heads a program reads.
        n, tile: number of rows, rows of a tile.
    """

    name: str
    dim: str
    head: str
    n: str
    tile: str

    def base(self) -> list[str]:
        """Lines before the loop, where it is loaded by pointers."""
        strides = f"{self.name.lower()}_stride_b, {self.name.lower()}_stride_h"
        return [f"{self.name}_HEAD = head({self.name}, b, {self.head}, {strides})"]

    def load(self, blocks: Blocks) -> str:
        """Expression for a tile."""
        first = f"{blocks.axis}0"
        if blocks.described:
            where, shape = f"[b, {self.head}, {blocks.digits}, 0]", f"[{self.tile}, {self.dim}_PAD]"
            return f"{self.name}_TILES{blocks.suffix}.load({where}).reshape({shape})"
        rows = f"{first}, {blocks.row}, {self.n}, {self.name.lower()}_stride_n"
        return f"load_tile({self.name}_HEAD, {rows}, {self.dim}_DIM, {self.dim}_PAD)"


@dataclass(frozen=True)
class Statistic:
    """A number per query that a loop over queries reads; STATISTICS holds one after another.

    Attributes:
        name: what it is called.
        number: which statistic it is.
    """

    name: str
    number: int

    def base(self) -> list[str]:
        """Lines before the loop: where those of one head begin, in the order of each view."""
        place = f"({self.number} * batch + b) * kv_heads * GROUP + h"
        return [f"{self.name} = ({place}).to(tl.int64)"]

    def load(self, blocks: Blocks) -> str:
        """Expression for those of a tile. They exist for whole blocks: nothing to check."""
        first = "q0" if blocks.order.is_natural else "q_at"
        if blocks.described:
            where = f"[{self.number}, b, h, {first}]"
            return f"STATISTICS_TILES{blocks.suffix}.load({where}).reshape([TILE_M])"
        name = f"STATISTICS{blocks.suffix}"
        rows = "rows" if blocks.order.is_natural else f"(lines_{blocks.number}_q * BLOCK_Q)"
        return f"tl.load({name} + {self.name} * {rows} + {first} + tl.arange(0, TILE_M))"


OVER_KEYS = (
    Operand("K", "HEAD", "h // GROUP", "n_kv", "TILE_N"),
    Operand("V", "VALUE", "h // GROUP", "n_kv", "TILE_N"),
)
OVER_QUERIES = (
    Operand("Q", "HEAD", "h", "n_q", "TILE_M"),
    Operand("GRAD_OUT", "VALUE", "h", "n_q", "TILE_M"),
    Statistic("LSE", 0),
    Statistic("DELTA", 1),
)


def title(view: View, number: int, of: int) -> str:
    """What a view is, in a comment."""
    plain = view.is_natural
    what = "plain order" if plain else f"queries in {view.q}, keys in {view.kv}"
    return f"View {number} of {of}: {what}."


def described_box(spec: KernelSpec, view: View, axis: str, tile: Tile) -> tuple[int, ...] | None:
    """The extents along the digits of a tile of the loop, over blocks of ``axis``.

    None if it is loaded by pointers. Descriptors have at most five dimensions: batch, head,
    features, and two for the token.

    >>> from sparse_compile.expr import KV, MaskExpr, Q
    >>> order = Order((64, 1), (128,), (1, 0))
    >>> attention = AttentionSpec(MaskExpr(KV <= Q), coverage=(View(KV <= Q, order, order),))
    >>> spec, tile = KernelSpec(attention, 64, 64, "float16", "sm_90"), Tile(64, 32, 4, 2, True)
    >>> described_box(spec, attention.parts[0], "kv", tile)
    (32, 1)
    """
    order, extent = order_of(view, axis), tile.extent(axis)
    if not tile.descriptors or not (order.is_natural or spec.exact):
        return None
    if order.is_natural:
        return (extent,)
    steps = order.block // extent
    if len(order.box) != 2 or order.box[0] % steps:
        return None
    return order.box[0] // steps, order.box[1]


@dataclass(frozen=True)
class Described:
    """Descriptors that a kernel takes: those of one view, or of all views in plain order.

    Attributes:
        suffix: what tells their parameters from others.
        order: of the blocks that the loop reads.
        box: extents of a tile along the digits of a token.
        views: numbers of the views.
    """

    suffix: str
    order: Order
    box: tuple[int, ...]
    views: tuple[int, ...]


def described_views(spec: KernelSpec, axis: str, tile: Tile) -> tuple[Described, ...]:
    """The descriptors of a kernel that loops over blocks of ``axis``."""
    found: dict[str, Described] = {}
    for number, view in enumerate(spec.attention.parts):
        order, box = order_of(view, axis), described_box(spec, view, axis, tile)
        if box is not None:
            suffix = "" if order.is_natural else f"_{number}"
            earlier = found[suffix].views if suffix in found else ()
            found[suffix] = Described(suffix, order, box, (*earlier, number))
    return tuple(found.values())

"""What the loops of the kernels read, and the expressions that load a tile of it."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_compile.codegen.triton.blocks.sections import Blocks


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

"""BlockShape: a shape of blocks to choose from, and what a pair costs in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockShape:
    """Blocks that kernels can work in.

    Attributes:
        q, kv: queries and keys per block.
        cost: of a pair of a query and a key, times that in blocks of 64 or more.
    """

    q: int
    kv: int
    cost: float = 1


#: Those of a GPU, measured on an H200.
GPU_SHAPES = (BlockShape(64, 64), BlockShape(32, 32, 1.6), BlockShape(16, 16, 3.2))


def given_shape(block: tuple[int, int], shapes: tuple[BlockShape, ...]) -> BlockShape:
    """The shape that a user asked for; if it is no other, a pair costs as in blocks as narrow.

    >>> given_shape((128, 32), GPU_SHAPES).cost, given_shape((128, 128), GPU_SHAPES).cost
    (1.6, 1)
    """
    known = {(shape.q, shape.kv): shape for shape in shapes}
    costs = {shape.q: shape.cost for shape in shapes if shape.q == shape.kv}
    return known.get(block) or BlockShape(*block, costs.get(min(block), 1))

"""Launch the forward over unions of neighbouring lists."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from sparse_compile.codegen.triton.blocks import arguments
from sparse_compile.codegen.triton.blocks.executor import workers_of
from sparse_compile.codegen.triton.selected import united
from sparse_compile.codegen.triton.selected.tiles import Tile

if TYPE_CHECKING:
    from sparse_compile.codegen.triton.selected.executor import _Launch
    from sparse_compile.codegen.triton.selected.source import SelectedKernelSpec


def tiles(spec: SelectedKernelSpec) -> list[Tile]:
    """The tile of the kernel, if it is made."""
    tile = united.union_tile(spec)
    return [] if tile is None else [tile]


def can_serve(launch: _Launch) -> bool:
    """Whether the kernel is worth trying; what the lists have in common, the device finds out."""
    return united.can_unite(launch.spec, launch.call) and is_large(launch)


def is_large(launch: _Launch) -> bool:
    """Whether programs of several units of queries, of which there are fewer, keep a GPU busy."""
    programs = math.prod(united.programs(launch.spec, launch.call))
    return programs >= 2 * workers_of(launch.call.q.device)


def forward(launch: _Launch, out: Tensor, lse: Tensor) -> Tensor:
    """Write OUT and LSE, if the unions cost less than the lists.

    Returns:
        int64 [1]: below zero if they do, and so did write.
    """
    # Imports Triton.
    from sparse_compile.codegen.triton.selected.union_lists import unite

    call, (tile,) = launch.call, tiles(launch.spec)
    lists = unite(call.index, call.count, united.neighbours(launch.spec), united.COSTS)
    launch.start(
        *("forward_union", tile, united.programs(launch.spec, call), *launch.operands_for(tile)),
        *(lists.index, lists.names, lists.count, lists.balance, out, lse),
        *(*arguments.strides(*launch.operands, out), *lists.index.shape[1:]),
        *(call.q.shape[1], call.q.shape[2], call.k.shape[2], call.scale, *launch.mask_data),
        launch.shared,
    )
    return lists.balance

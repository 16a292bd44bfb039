"""Launch the forward over unions of neighbouring lists."""

from __future__ import annotations

import math

from torch import Tensor

from sparse_compile.codegen.triton.calls import Running
from sparse_compile.codegen.triton.selected import united


def can_serve(launch: Running) -> bool:
    """Whether the kernel is worth trying; what the lists have in common, the device finds out."""
    return united.can_unite(launch.prepared.spec, launch.call) and is_large(launch)


def is_large(launch: Running) -> bool:
    """Whether programs of several units of queries, of which there are fewer, keep a GPU busy."""
    return math.prod(united.programs(launch.prepared.spec, launch.call)) >= 2 * launch.workers


def forward(launch: Running, out: Tensor, lse: Tensor) -> Tensor:
    """Write OUT and LSE, if the unions cost less than the lists.

    Returns:
        int64 [1]: below zero if they do, and so did write.
    """
    # Imports Triton.
    from sparse_compile.codegen.triton.selected.union_lists import unite

    spec = launch.prepared.spec
    index, count = launch.given["INDEX"], launch.given["COUNT"]
    lists = unite(index, count, united.neighbours(spec), united.COSTS)
    tensors = {"INDEX": lists.index, "NAMES": lists.names, "COUNT": lists.count}
    tensors |= {"BALANCE": lists.balance, "OUT": out, "LSE": lse}
    _, _, unions, most = lists.index.shape
    grid = united.programs(spec, launch.call)
    launch.start("forward_union", grid, tensors, unions=unions, most=most)
    return lists.balance

"""The operator that selects for Native Sparse Attention, by the attention to compressed keys."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.codegen.precision import full_precision
from sparse_compile.ops.registered import fake_lists, operator
from sparse_compile.patterns.checks import blocks
from sparse_compile.patterns.local import Causal
from sparse_compile.patterns.scored import TopK
from sparse_compile.patterns.scorers import Compressed
from sparse_compile.selection.select import select


def _like_lists(q: Tensor, k: Tensor, settings: list[int]) -> tuple[Tensor, Tensor]:
    *rows, room = _shape(q, k, settings)
    return fake_lists(q, rows, room)


@operator(_like_lists)
def nsa_select(
    q: Tensor,
    k: Tensor,
    compressed: Tensor,
    settings: list[int],
    align: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The units of keys that Native Sparse Attention selects for each query.

    Args:
        q: [B, Hq, Nq, D].
        k: [B, Hkv, Nkv, D].
        compressed: [B, Hc, Nc, D], a key for each whole window; Hc divides Hq.
        settings: keys of a unit, and of a block; how many blocks; keys of a window, and from one
            to the next; forced blocks at the start, and up to the query's own.
        align: the corner in which the diagonal starts.
        scale: factor on the products of queries and compressed keys.

    Returns:
        index int32 [B, Hkv, Nq, K] and count int32 [B, Hkv, Nq], as in
        :class:`sparse_compile.selection.Selection`; K follows from the lengths.
    """
    unit, block, most, window, stride, sink, local = settings
    pattern = TopK(
        most,
        unit_kv=unit,
        block=block,
        scorer=Compressed(compressed, window, stride, scale),
        sink=sink,
        local=local,
        align=align,
    )
    if not (q.numel() and k.numel()):
        shape = _shape(q, k, settings)
        index = torch.zeros(shape, dtype=torch.int32, device=q.device)
        return index, torch.zeros(shape[:3], dtype=torch.int32, device=q.device)
    with full_precision(q.device.type):
        chosen = select(pattern, q, k, Causal(align).bound().expr)
    return chosen.index, chosen.count


def _shape(q: Tensor, k: Tensor, settings: list[int]) -> tuple[int, int, int, int]:
    unit, block, most, *_ = settings
    room: int = torch.sym_min(blocks(k.shape[2], block), most)  # type: ignore[no-untyped-call]
    return q.shape[0], k.shape[1], q.shape[2], room * (block // unit)


#: The operator as nodes of a graph call it.
NSA_SELECT = torch.ops.sparse_compile.nsa_select.default

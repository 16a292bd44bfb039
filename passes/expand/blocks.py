"""Whether the lists of a block mask say the same as its ``mask_mod``.

The reference implementation of ``flex_attention`` reads ``mask_mod`` alone; its kernels visit the
blocks that are listed. A block mask that ``create_block_mask`` makes says one thing twice, but
lists can also be given by hand, to hide what ``mask_mod`` does not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from sparse_compile.passes.expand.inputs import Inputs, length
from sparse_compile.passes.expand.spread import Spread
from sparse_compile.sites.site import Refused

#: Pairs of queries and keys that are compared at most.
_MOST = 1 << 22


def check_blocks(
    operands: tuple[Node, Node],
    blocks: tuple[object, ...],
    mask_mod: Spread,
    given: tuple[Node, ...],
    inputs: Inputs,
) -> None:
    """Compare the lists with ``mask_mod``, on the example that is compiled with.

    Args:
        operands: q and k.
        blocks: the items of the block mask: lengths, counts and indices, ..., sizes of blocks.
        mask_mod: the mask.
        given: the tensors that it reads.
        inputs: of the graph.

    Raises:
        Refused: they differ, or lists are computed from values that ``mask_mod`` does not see.
    """
    nodes = [item for item in blocks[2:6] if isinstance(item, Node)]
    lists, read = [inputs.example(n) for n in nodes], [inputs.example(n) for n in given]
    if any(one is None for one in lists):
        if inputs.reads_floats(nodes, given):
            raise Refused(
                "its blocks are selected by values that its mask_mod does not see",
                "say in mask_mod which pairs are kept",
            )
        return
    (n_q, n_kv), sizes = (length(one, 2) for one in operands), blocks[-2:]
    if n_q and n_kv and all(isinstance(size, int) for size in sizes) and None not in read:
        known = [one for one in (*lists, *read) if one is not None]
        with torch.no_grad():
            same = _agree(known[: len(lists)], (n_q, n_kv), sizes, mask_mod, known[len(lists) :])
        if not same:
            raise Refused(
                "its block mask lists other blocks than its mask_mod allows",
                "make it with create_block_mask, or say in mask_mod which pairs are kept",
            )


def _agree(
    lists: list[Tensor],
    lengths: tuple[int, int],
    sizes: tuple[object, ...],
    mask_mod: Spread,
    given: list[Tensor],
) -> bool:
    (n_q, n_kv), (block_q, block_kv), device = lengths, sizes, lists[0].device
    assert isinstance(block_q, int)
    assert isinstance(block_kv, int)
    batch, heads = lists[0].shape[:2]
    rows = max(1, min(n_q, _MOST // (batch * heads * n_kv)))
    q = torch.linspace(0, n_q - 1, rows, device=device).long()
    kv = torch.arange(n_kv, device=device)
    b, h = (torch.arange(n, device=device) for n in (batch, heads))
    places = b.view(-1, 1, 1, 1), h.view(-1, 1, 1), q.view(-1, 1), kv
    allowed = mask_mod(*places, *given)
    at = (q // block_q).view(-1, 1), kv // block_kv
    partial, *full = (
        _listed(count, index, -(-n_kv // block_kv))[:, :, at[0], at[1]]
        for count, index in zip(lists[::2], lists[1::2], strict=True)
    )
    whole = full[0] if full else torch.zeros_like(partial)
    hidden = (allowed & ~(partial | whole)).any()
    forced = (whole & ~allowed).any()
    return not bool(hidden | forced)


def _listed(count: Tensor, index: Tensor, columns: int) -> Tensor:
    """Which blocks of keys are listed for each block of queries: bool [B, H, rows, columns]."""
    live = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
    places = torch.where(live, index.long(), columns)
    found = torch.zeros(*count.shape, columns + 1, dtype=torch.bool, device=index.device)
    return found.scatter(-1, places, True)[..., :columns]

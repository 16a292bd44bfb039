"""FlexAttention and SDPA as peers of attention over selected keys.

FlexAttention visits blocks of 128 queries and 128 keys. Where the queries of a block select
together, and units of 128 keys, its block mask says just that. Where each query selects, it visits
every block that some query of it wants, and reads in a table, for every pair, whether it is wanted:
for random selections that are nearly all blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.side_by_side import Call, Problem

BLOCK = 128


def table(p: Problem) -> Tensor:
    """bool [Hs, rows, units]: which units the lists of a problem have."""
    assert p.lists is not None
    index, count = p.lists
    units = -(-p.k.shape[2] // p.unit_kv)
    used = torch.arange(index.shape[3], device=index.device) < count[..., None]
    place = torch.where(used, index, units).long()[0]
    found = torch.zeros(*place.shape[:2], units + 1, dtype=torch.bool, device=index.device)
    return found.scatter_(2, place, True)[..., :units].contiguous()


def by_query(p: Problem) -> Any:
    """The block mask where each query selects: all blocks partial, and a table inside them."""
    from torch.nn.attention.flex_attention import BlockMask

    wanted, group, unit = table(p), p.group, p.unit_kv
    heads, n, units = wanted.shape
    cells = wanted.view(heads, n // BLOCK, BLOCK, units * unit // BLOCK, BLOCK // unit)
    blocks = cells.any(4).any(2).repeat_interleave(group, 0)[None]
    count, index = _lists(blocks)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return wanted[h // group, q, kv // unit] & (kv <= q)

    return BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=BLOCK, mask_mod=mask_mod)


def by_block(p: Problem) -> Any:
    """The block mask where blocks of queries select blocks of keys, one of them their own."""
    from torch.nn.attention.flex_attention import BlockMask

    assert p.unit_q == p.unit_kv == BLOCK
    wanted = table(p).repeat_interleave(p.group, 0)[None]
    own = torch.eye(wanted.shape[-1], dtype=torch.bool, device=wanted.device)
    return BlockMask.from_kv_blocks(
        *_lists(wanted & own), *_lists(wanted & ~own), BLOCK_SIZE=BLOCK, mask_mod=_causal
    )


def _causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """int32: how many blocks of each row are wanted, and which, those first."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def flex(mask: Any, compiled: bool = True) -> Call:
    """FlexAttention, compiled afresh."""
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    # Its backward is run many times over.
    torch._functorch.config.donated_buffer = False
    call = functools.partial(flex_attention, block_mask=mask, enable_gqa=True)
    made: Call = torch.compile(call) if compiled else call
    return made


def sdpa(backend: str, causal: bool = True, gqa: bool = True) -> Call:
    """SDPA by one backend: "CUDNN_ATTENTION", "FLASH_ATTENTION" or "MATH"."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kind = getattr(SDPBackend, backend)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([kind]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

    return call


def dense(p: Problem, backend: str, backward: bool = True) -> tuple[Problem, Call, str]:
    """A problem without its selection, and SDPA for it by a backend.

    Where the backend does not take fewer heads of keys, they are repeated beforehand.
    """
    whole = Problem(p.q, p.k, p.v, p.grad_out)
    call = sdpa(backend)
    if _takes(call, [t[:, :, :BLOCK] for t in whole.inputs], backward):
        return whole, call, "grouped heads"
    return whole.expanded(), sdpa(backend, gqa=False), "keys repeated for every head"


def _takes(call: Call, inputs: list[Tensor], backward: bool) -> bool:
    inputs = [t.detach().requires_grad_(backward) for t in inputs]
    try:
        out = call(*inputs)
        if backward:
            torch.autograd.grad(out.sum(), inputs)
    except RuntimeError:
        return False
    return True

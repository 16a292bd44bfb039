"""FlashAttention-4 (flash_attn.cute): its call, and masks written in CuTe for it.

CuTe reads the source of a mask_mod, so each is spelled out here, with its numbers from the
enclosing function.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import Problem
from benchmarks.cases import PREFIX
from benchmarks.cases import documents as document_ids


def flash_attention(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    """The output for operands [B, H, N, D]."""
    from flash_attn.cute import flash_attn_func

    result = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), **arguments)
    out: Tensor = result[0] if isinstance(result, (tuple, list)) else result
    return out.transpose(1, 2)


def mask_arguments(p: Problem, block_mask: Any, name: str) -> dict[str, Any]:
    """The arguments that say a mask by a mask_mod and the blocks of a FlexAttention block mask."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    mask_mod, aux = MASK_MODS[name](p)
    _, _, *lists = block_mask.as_tuple()[:10]
    by_query, by_key = lists[:4], lists[4:]
    fields = ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx")
    # Forward lists keys of queries, backward queries of keys; 128 x 128 is what Hopper takes.
    tensors = [
        BlockSparseTensorsTorch(
            **{field: t.to(torch.int32) for field, t in zip(fields, some, strict=True)},
            block_size=(128, 128),
        )
        for some in (by_query, by_key)
    ]
    arguments: dict[str, Any] = {
        "mask_mod": mask_mod,
        "block_sparse_tensors": tensors[0],
        "block_sparse_tensors_bwd": tensors[1],
    }
    return arguments | ({"aux_tensors": aux} if aux else {})


def _longformer(p: Problem) -> tuple[Any, list[Tensor]]:
    import cutlass
    import cutlass.cute as cute
    from flash_attn.cute import utils

    @cute.jit
    def mask_mod(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
        reach = utils.scalar_to_ssa(256, cutlass.Int32)
        tokens = utils.scalar_to_ssa(64, cutlass.Int32)
        near = (m_idx - n_idx <= reach) & (n_idx - m_idx <= reach)
        return near | (m_idx < tokens) | (n_idx < tokens)

    return mask_mod, []


def _documents(p: Problem) -> tuple[Any, list[Tensor]]:
    import cutlass
    import cutlass.cute as cute
    from flash_attn.cute import utils

    @cute.jit
    def mask_mod(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
        ids = aux_tensors[0]
        of_query = utils.scalar_to_ssa(ids[batch[0], head[0], m_idx[0]], cutlass.Int32)
        of_key = utils.scalar_to_ssa(ids[batch[0], head[0], n_idx[0]], cutlass.Int32)
        return (of_query == of_key) & (n_idx <= m_idx)

    heads = p.inputs[0].shape[1]
    ids = document_ids(p.n, p.device).expand(1, heads, p.n).contiguous()
    return mask_mod, [ids]


def _prefix(p: Problem) -> tuple[Any, list[Tensor]]:
    import cutlass
    import cutlass.cute as cute
    from flash_attn.cute import utils

    prefix = PREFIX

    @cute.jit
    def mask_mod(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
        tokens = utils.scalar_to_ssa(prefix, cutlass.Int32)
        return (n_idx <= m_idx) | (n_idx < tokens)

    return mask_mod, []


def _dilated(p: Problem) -> tuple[Any, list[Tensor]]:
    import cutlass
    import cutlass.cute as cute
    from flash_attn.cute import utils

    @cute.jit
    def mask_mod(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
        reach = utils.scalar_to_ssa(1024, cutlass.Int32)
        step = utils.scalar_to_ssa(4, cutlass.Int32)
        none = utils.scalar_to_ssa(0, cutlass.Int32)
        near = (m_idx - n_idx <= reach) & (n_idx - m_idx <= reach)
        # The remainder of a negative number is 0 exactly where that of its modulus is.
        return near & ((m_idx - n_idx) % step == none)

    return mask_mod, []


def _blocklocal(p: Problem) -> tuple[Any, list[Tensor]]:
    import cutlass
    import cutlass.cute as cute
    from flash_attn.cute import utils

    @cute.jit
    def mask_mod(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
        size = utils.scalar_to_ssa(512, cutlass.Int32)
        return m_idx // size == n_idx // size

    return mask_mod, []


#: For each mask: its mask_mod, and the tensors that it reads.
MASK_MODS: dict[str, Callable[[Problem], tuple[Any, list[Tensor]]]] = {
    "longformer": _longformer,
    "documents": _documents,
    "prefix": _prefix,
    "dilated": _dilated,
    "blocklocal": _blocklocal,
}

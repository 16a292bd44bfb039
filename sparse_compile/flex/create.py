"""create_block_mask: a mask from a function, without looking at pairs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_compile.errors import BadPattern, PatternMisuse
from sparse_compile.flex.block_mask import DEFAULT_BLOCK, BlockMask, check_block
from sparse_compile.flex.program import program_of
from sparse_compile.flex.record import record
from sparse_compile.flex.signatures import like_torch


@like_torch
def create_block_mask(
    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: Any = None,
    BLOCK_SIZE: int | tuple[int, int] = DEFAULT_BLOCK,
    _compile: bool = False,
    separate_full_blocks: bool = True,
    compute_dq_write_order: bool = False,
    dq_kv_order: bool = True,
) -> BlockMask:
    """``torch.nn.attention.flex_attention.create_block_mask`` that makes nothing of size Nq x Nkv.

    The function is read, and checked; blocks are found when attention runs, in the block shape of
    its kernels, and kept while nothing writes to the tensors that the function reads.

    Args:
        mask_mod: ``fn(b, h, q_idx, kv_idx)``, true where a query may attend to a key.
        B: batch entries with masks of their own; None or 1 if all share one.
        H: query heads, likewise.
        Q_LEN: number of queries.
        KV_LEN: number of keys.
        device: of the queries; the current accelerator, or else the CPU, unless given.
        BLOCK_SIZE: queries and keys of a block in lists and pictures.
        _compile: without effect, there is nothing to compile.
        separate_full_blocks: whether the lists name full blocks apart.
        compute_dq_write_order: without effect: gradients are the same bits each time anyway.
        dq_kv_order: without effect.

    Raises:
        Inexpressible: the function does what no expression can say; says which operation.
        BadPattern, PatternMisuse: lengths, blocks or the function make no sense.

    >>> def window(b, h, q_idx, kv_idx):
    ...     return (q_idx >= kv_idx) & (q_idx - kv_idx < 256)
    >>> mask = create_block_mask(window, None, None, 1024, 1024, device="cpu")
    >>> mask.kv_num_blocks.tolist(), round(mask.sparsity(), 1)
    ([[[1, 1, 2, 2, 2, 2, 2, 2]]], 67.2)
    """
    _check_function(mask_mod)
    block = check_block(BLOCK_SIZE)
    sizes = 1 if B is None else B, 1 if H is None else H
    for name, size in zip(("B", "H", "Q_LEN", "KV_LEN"), (*sizes, Q_LEN, KV_LEN), strict=True):
        if isinstance(size, bool) or size < 0:
            raise BadPattern(f"sparse_compile: {name}={size!r}. Write how many there are.")
    if device is None:
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
    where = torch.empty(0, device=device).device
    made = BlockMask._of(mask_mod, sizes, (Q_LEN, KV_LEN), block, where)
    made._separate = separate_full_blocks
    if not torch.compiler.is_compiling():
        program_of(record(mask_mod, None, where).text, (*sizes, Q_LEN, KV_LEN))
    return made


def _check_function(mask_mod: Any) -> None:
    if not callable(mask_mod):
        raise PatternMisuse(
            f"sparse_compile: create_block_mask() got a mask_mod of type "
            f"{type(mask_mod).__name__}. Pass a function of (b, h, q_idx, kv_idx)."
        )
    if torch.compiler.is_compiling():
        return
    places = list(inspect.signature(mask_mod).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [one for one in places if one.default is one.empty and one.kind in positional]
    if len(needed) != 4 and not any(one.kind is one.VAR_POSITIONAL for one in places):
        what = "a score_mod" if len(needed) == 5 else f"a function of {len(needed)} arguments"
        raise PatternMisuse(
            f"sparse_compile: create_block_mask() got {what}. Pass a function of "
            "(b, h, q_idx, kv_idx) that returns a bool."
        )

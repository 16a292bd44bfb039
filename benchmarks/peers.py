"""The peers: compiled FlexAttention, and FlashAttention-4 where it is installed."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch

from benchmarks.accuracy import Problem, Run
from benchmarks.ours import by_autograd

AUTOTUNED = "max-autotune-no-cudagraphs"
#: Up to this length the mask is materialised to make the block mask of it: a compiled
#: create_block_mask takes a minute to compile at 16384.
_MATERIALISED = 32768


class NotExpressible(Exception):
    """A peer that cannot run a case, and why."""


def block_mask(p: Problem) -> Any:
    """FlexAttention's block mask, made as its documentation advises for long sequences."""
    from torch.nn.attention.flex_attention import create_block_mask

    mask_mod = p.case.mask_mod(p.n, p.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_block_mask(
            mask_mod, None, None, p.n, p.n, device=p.device, _compile=p.n > _MATERIALISED
        )


def flex(p: Problem, backward: bool, mode: str | None = None, backend: str | None = None) -> Run:
    """Compiled FlexAttention.

    Args:
        mode: of torch.compile.
        backend: ``"FLASH"`` makes it generate a FlashAttention-4 kernel.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    options = {"BACKEND": backend} if backend else None
    attention = functools.partial(flex_attention, block_mask=block_mask(p), kernel_options=options)
    compiled = torch.compile(attention, mode=mode)
    return by_autograd(compiled, p.inputs, backward)


def flex_flash(p: Problem, backward: bool) -> Run:
    _require_fa4()
    return flex(p, backward, backend="FLASH")


def fa4(p: Problem, backward: bool) -> Run:
    """FlashAttention-4 called directly."""
    arguments = p.case.fa4
    if isinstance(arguments, str) and " " in arguments:
        raise NotExpressible(arguments)
    _require_fa4()
    from benchmarks.fa4 import flash_attention, mask_arguments

    if isinstance(arguments, str):
        torch._dynamo.reset()
        arguments = mask_arguments(p, block_mask(p), arguments)
        blocks = "mask_mod and blocks of 128 x 128 from create_block_mask"
    else:
        blocks = "arguments"
    call = functools.partial(flash_attention, **arguments)
    return by_autograd(call, p.inputs, backward, heads_inside, {"mask_by": blocks})


def heads_inside(t: torch.Tensor) -> torch.Tensor:
    """The same [B, H, N, D], stored as [B, N, H, D], which is what FlashAttention takes."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _require_fa4() -> None:
    try:
        import flash_attn.cute  # noqa: F401
    except Exception as error:
        raise NotExpressible(f"flash_attn.cute cannot be imported: {error!r}") from error

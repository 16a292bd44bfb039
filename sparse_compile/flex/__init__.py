"""FlexAttention's functions with this library's layouts: a drop-in for code that calls them.

    from sparse_compile.flex import flex_attention, create_block_mask

takes the place of the same import from ``torch.nn.attention.flex_attention``. What builds on the
functions alone, :func:`and_masks`, :func:`or_masks`, :func:`noop_mask` and :func:`create_mask`, is
torch's own.

>>> mask = create_block_mask(noop_mask, None, None, 64, 64, device="cpu")
>>> mask.shape
(1, 1, 64, 64)
"""

from torch.nn.attention.flex_attention import (
    AuxOutput,
    AuxRequest,
    FlexKernelOptions,
    and_masks,
    create_mask,
    noop_mask,
    or_masks,
)

from sparse_compile.flex.attention import flex_attention
from sparse_compile.flex.block_mask import BlockMask
from sparse_compile.flex.create import create_block_mask

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "FlexKernelOptions",
    "and_masks",
    "create_block_mask",
    "create_mask",
    "flex_attention",
    "noop_mask",
    "or_masks",
]

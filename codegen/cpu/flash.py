"""PyTorch's fused CPU attention on batches of small tiles: the one place that calls it.

The two operators are not public API, so everything else goes through :func:`forward` and
:func:`backward`, ``tests/codegen/test_cpu_flash.py`` pins what is relied upon, and plain matrix
products stand in where the operators are missing, or do not know the score.
"""

from __future__ import annotations

import functools
import math
from typing import Any, cast

import torch
from torch import Tensor

from sparse_compile.codegen.cpu import products
from sparse_compile.codegen.cpu.products import Tiles

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"


@functools.lru_cache(maxsize=1)
def _operators() -> tuple[Any, Any] | None:
    try:
        return getattr(torch.ops.aten, _FORWARD), getattr(torch.ops.aten, _FORWARD + "_backward")
    except AttributeError:
        return None


def forward(tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Attention of each tile of queries to its own keys.

    Returns:
        out [tiles, heads, rows, D] in the dtype of q, or in fp32 by plain products, and the
        natural-log log-sum-exp [tiles, heads, rows], fp32 (fp64 for fp64 inputs): 0 and -inf on
        rows that attend to nothing.
    """
    operators, bias, score = _operators(), tiles.bias, tiles.score
    if operators is None or score.program is not None:
        return products.forward(tiles)
    given = tiles.q, tiles.k, tiles.v, 0.0, False
    values = None if bias is None else bias.values
    out, lse = operators[0](*given, attn_mask=values, scale=score.scale)
    if bias is not None and bias.empty is not None:
        # The operator's own answer for these rows differs between versions of PyTorch.
        out = out.masked_fill(bias.empty[..., None], 0.0)
        lse = lse.masked_fill(bias.empty, -math.inf)
    return out, lse


def backward(
    tiles: Tiles, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The share of these tiles in the gradients of q, k and v.

    ``out`` and ``lse`` [tiles, heads, rows] may be those of the whole rows, of which these keys are
    a part: weights are ``exp(score - lse)``. ``lse`` must be finite, also on empty rows.

    Returns:
        dq [tiles, heads, rows, D], dk and dv [tiles, heads, keys, D], in the dtype of q, or in fp32
        by plain products.
    """
    operators, bias, score = _operators(), tiles.bias, tiles.score
    if operators is None or score.program is not None:
        return products.backward(tiles, grad_out, out, lse)
    given = grad_out, tiles.q, tiles.k, tiles.v, out, lse, 0.0, False
    values = None if bias is None else bias.values
    grads = operators[1](*given, attn_mask=values, scale=score.scale)
    return cast(tuple[Tensor, Tensor, Tensor], grads)

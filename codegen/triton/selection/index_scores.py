"""Launch the kernel that scores tokens as a lightning indexer does."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.codegen.runtime.launch import DTYPE_NAMES, strides
from sparse_compile.codegen.triton.selection.index_source import IndexSpec, index_kernel, tiles
from sparse_compile.codegen.triton.selection.printable import key_of, launch
from sparse_compile.selection.visible import Visible
from sparse_compile.spec.target import Target

#: What the kernel holds of a key, and of the heads' products in half and in single precision.
_MOST_DIM, _MOST_HEADS, _MOST_HEADS_SINGLE = 256, 128, 32


def can_index(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel can score these queries and keys: in its sizes and dtypes."""
    heads, dim = q.shape[1], q.shape[3]
    most = _MOST_HEADS_SINGLE if q.dtype == torch.float32 else _MOST_HEADS
    fits = heads <= most and dim <= _MOST_DIM and min(q.numel(), k.numel()) > 0
    return fits and q.dtype == k.dtype and q.dtype in DTYPE_NAMES


def index_scores(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    queries: tuple[int, int],
    visible: Visible,
    factor: float = 1.0,
) -> Tensor:
    """``sum_i w_i * relu(q_i . k)`` for some queries.

    Args:
        q: [B, H, Nq, D].
        k: [B, Nkv, D], same dtype.
        w: [B, Nq, H], floating.
        queries: the first, and the end.
        visible: in its runs; those that are not visible need not be written.
        factor: on the scores.

    Returns:
        fp32 [B, end - first, Nkv].
    """
    (first, end), (batch, heads, n_q, dim), n_kv = queries, q.shape, k.shape[1]
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    dtype = DTYPE_NAMES[q.dtype]
    run_q, run_kv = tiles(dtype)
    key = key_of(visible, run_q, run_kv)
    # A tile that is left out must not hold a part of a run that is visible.
    whole = first % run_q == run_q % visible.run_q == run_kv % visible.run_kv == 0
    masked = whole and visible.printable
    spec = IndexSpec(key, masked, heads, dim, dtype, Target.of(q.device).arch)
    scores = torch.empty(batch, end - first, n_kv, dtype=torch.float32, device=q.device)
    w_steps = {f"w_stride_{axis}": step for axis, step in zip("bnh", w.stride(), strict=True)}
    values = {"Q": q, "K": k, "W": w, "SCORES": scores, **strides(q=q), **w_steps}
    values |= {"k_stride_b": k.stride(0), "k_stride_n": k.stride(1)}
    values |= {"first": first, "end": end, "factor": factor, "n_q": n_q, "n_kv": n_kv}
    values |= key.values(visible.sizes) if masked else {}
    grid = -(-n_kv // run_kv), -(-(end - first) // run_q), batch
    launch(index_kernel, spec, q.device, grid, values)
    return scores

"""Launch the kernel that scores tokens as a lightning indexer does."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.codegen.runtime.launch import DTYPE_NAMES, strides
from sparse_compile.codegen.triton.selection.index_source import IndexSpec, index_kernel, tiles
from sparse_compile.codegen.triton.selection.printable import key_of, launch
from sparse_compile.selection.builders import Indexing
from sparse_compile.spec.target import Target

#: What the kernel holds of a key, and of the heads' products in half and in single precision.
_MOST_DIM, _MOST_HEADS, _MOST_HEADS_SINGLE = 256, 128, 32


def can_index(of: Indexing) -> bool:
    """Whether the kernel can score these queries and keys: in its sizes and dtypes."""
    q, k, heads, dim = of.q, of.k, of.q.shape[1], of.q.shape[3]
    most = _MOST_HEADS_SINGLE if q.dtype == torch.float32 else _MOST_HEADS
    fits = heads <= most and dim <= _MOST_DIM and min(q.numel(), k.numel()) > 0
    return fits and q.dtype == k.dtype and q.dtype in DTYPE_NAMES


def index_scores(of: Indexing, first: int, end: int) -> Tensor:
    """The scores of the queries ``first, ..., end - 1``: fp32 [B, end - first, Nkv]."""
    q, k, w, visible = of.q, of.k, of.w, of.visible
    (batch, heads, n_q, dim), n_kv = q.shape, k.shape[1]
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
    values |= {"first": first, "end": end, "factor": of.factor, "n_q": n_q, "n_kv": n_kv}
    values |= key.values(visible.sizes) if masked else {}
    grid = -(-n_kv // run_kv), -(-(end - first) // run_q), batch
    launch(index_kernel, spec, q.device, grid, values)
    return scores

"""Cases of :mod:`benchmarks.selected_peers` with few queries, or of DeepSeek Sparse Attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import Tensor

from benchmarks.flex_selected import sdpa
from benchmarks.selected import DIM, KV_HEADS, operands
from benchmarks.selected_sizes import Sizes
from benchmarks.side_by_side import Problem, Row, attempt, errors, graphed, measure, median_ms
from sparse_compile import patterns as P
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.ops import ATTENTION
from sparse_compile.ops.indexer import INDEXED_TOPK
from sparse_compile.selection.select import select
from sparse_compile.spec import AttentionSpec
from sparse_compile.spec.indexer import IndexerSpec

#: Of the attention of DeepSeek-V3.2 in its latent shape: heads, width of keys, of values.
LATENT = (128, 576, 512)
#: Of its indexer: heads and their width.
INDEXER = (64, 128)


def decoding(sizes: Sizes) -> Iterator[Row]:
    """One query for each sequence, in CUDA graphs; dense: SDPA of the whole cache."""
    for batch in sizes.batches:
        q, k, v = operands(batch, 1, sizes.cache, sizes.device)
        names = {
            "case": f"decoding, {batch} sequences of {sizes.cache}, top {sizes.most} of units of 64"
        }
        for name, run, note in _ways_to_decode(sizes, q, k, v):

            def measured(run: Callable[[], Any] = run, note: str = note) -> Row:
                return {"graph_ms": median_ms(graphed(run)), "note": note}

            yield attempt({**names, "by": name}, measured)


Way = tuple[str, Callable[[], Any], str]


def _ways_to_decode(sizes: Sizes, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Way]:
    text = AttentionSpec.of_units(MaskExpr(sympy.true), 1, 64).text
    pattern = P.TopK(sizes.most, unit_kv=64, local=1, align="lower_right")
    index = [torch.randperm(sizes.cache // 64, device=q.device)[: sizes.most].sort().values]
    index = [index[0].to(torch.int32).expand(q.shape[0], KV_HEADS, 1, -1).contiguous()]
    count = torch.full(index[0].shape[:3], sizes.most, dtype=torch.int32, device=q.device)

    def attend(index: Tensor, count: Tensor) -> Tensor:
        out: Tensor = ATTENTION(q, k, v, [], [], [], [index, count], DIM**-0.5, text)[0]
        return out

    yield "ours, attention alone", functools.partial(attend, index[0], count), "random units"
    yield "ours, selection and attention", _chosen(pattern, q, k, attend), "means made each time"
    means = k.unflatten(2, (-1, 64)).mean(3, dtype=torch.float32)

    def by_kept_means(q: Tensor, k: Tensor) -> Tensor:
        return q.float().view(q.shape[0], KV_HEADS, -1, DIM).sum(2, keepdim=True) @ means.mT

    kept = P.TopK(sizes.most, unit_kv=64, local=1, align="lower_right", scorer=by_kept_means)
    yield "ours, selection and attention", _chosen(kept, q, k, attend), "means kept in fp32"
    # Without a mask the query heads of a key head are as good as queries.
    grouped = q.view(q.shape[0], KV_HEADS, -1, DIM)
    for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION") if sizes.on_gpu else ("MATH",):
        dense = sdpa(backend, causal=False, gqa=False)
        yield f"dense, {backend}", functools.partial(dense, grouped, k, v), "a group as queries"


def _chosen(
    pattern: Any, q: Tensor, k: Tensor, attend: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        found = select(pattern, q, k)
        return attend(found.index, found.count)

    return run


def indexer(sizes: Sizes) -> Iterator[Row]:
    """The best tokens by the lightning indexer, and the memory that takes."""
    n, (heads, dim) = sizes.indexed, INDEXER
    device = sizes.device
    q, w = (torch.randn(1, n, heads, *d, device=device).bfloat16() for d in ((dim,), ()))
    k = torch.randn(1, n, dim, device=device).bfloat16().mT
    names = {"case": f"indexer, {n} x {n}, {heads} heads of {dim}, top {sizes.tokens}, causal"}
    mask = MaskExpr(KV <= Q)
    spec = IndexerSpec((("mul", dim**-0.5),), (), True, mask, -math.inf, False, single=True)
    run = functools.partial(INDEXED_TOPK, q, k, w.float(), [], [], sizes.tokens, spec.text)

    def measured() -> Row:
        found = run()
        row: Row = {"peak_bytes": _peak(run, device), "bytes_of_fp32_logits": 4 * n * n}
        row["bytes_of_result"] = found.numel() * found.element_size()
        row["ms"] = median_ms(run)
        row["causal_tflops"] = heads * dim * n * (n + 1) / row["ms"] / 1e9
        return row | _indexer_errors(q, k, w, found)

    yield attempt({**names, "by": "ours, P.DSA"}, lambda: _selected_by_indexer(q, k, w, sizes))
    yield attempt({**names, "by": "ours, as recognised in a model"}, measured)


def _selected_by_indexer(q: Tensor, k: Tensor, w: Tensor, sizes: Sizes) -> Row:
    """The lists that ``P.DSA`` makes for the attention of a model."""
    n = q.shape[1]
    pattern = P.DSA(q.transpose(1, 2), k.mT, w, k=sizes.tokens)
    operands = (torch.empty(1, 1, n, 16, dtype=q.dtype, device=q.device) for _ in range(2))
    run = functools.partial(select, pattern, *operands, MaskExpr(KV <= Q))
    found = run().index[:, 0].long()
    row: Row = {"peak_bytes": _peak(run, str(q.device.type)), "bytes_of_fp32_logits": 4 * n * n}
    row["ms"] = median_ms(run)
    row["causal_tflops"] = q.shape[2] * q.shape[3] * n * (n + 1) / row["ms"] / 1e9
    return row | _indexer_errors(q, k, w, found)


def _peak(run: Callable[[], Any], device: str) -> int:
    """Bytes that a run allocates beyond those before it, at most."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _indexer_errors(q: Tensor, k: Tensor, w: Tensor, found: Tensor) -> Row:
    """What sampled queries miss of the best tokens by scores in fp64, and by how much.

    ``deficit`` is how far the least score that was kept is below the least that should have been,
    relative to the largest score.
    """
    least, deficit, most = 1.0, 0.0, found.shape[2]
    for token in torch.linspace(most, q.shape[1] - 1, 16).long().tolist():
        each = (q[0, token].double() @ k[0, :, : token + 1].double()).relu()
        scores = w[0, token].double() @ each
        best = scores.topk(most)
        kept = found[0, token]
        shared = torch.isin(kept, best.indices).double().mean()
        least = min(least, float(shared))
        worst = scores[kept.clamp(max=token)].min()
        deficit = max(deficit, float((best.values[-1] - worst) / scores.abs().max()))
    return {"shared_with_fp64": least, "deficit": deficit}


def latent(sizes: Sizes) -> Iterator[Row]:
    """Attention of DeepSeek-V3.2 to selected tokens: values are a part of the keys."""
    heads, dim, value_dim = LATENT
    n_q, n_kv, device = sizes.indexed_rows, sizes.indexed, sizes.device
    q, grad = (
        torch.randn(1, n_q, heads, d, device=device).bfloat16().transpose(1, 2)
        for d in (dim, value_dim)
    )
    kv = torch.randn(1, 1, n_kv, dim, device=device).bfloat16()
    position = torch.arange(n_q, device=device)[:, None] + (n_kv - n_q)
    draws = torch.rand(n_q, n_kv, device=device)
    draws = draws.masked_fill_(torch.arange(n_kv, device=device) > position, -1)
    index = draws.topk(sizes.tokens, -1).indices.sort(-1).values[None, None].to(torch.int32)
    del draws
    count = torch.full(index.shape[:3], sizes.tokens, dtype=torch.int32, device=device)
    p = Problem(q, kv, kv[..., :value_dim], grad, (index, count), offset=n_kv - n_q)
    text = AttentionSpec.of_units(MaskExpr(sympy.true), 1, 1).text
    names = {"case": f"{heads} heads of {dim}/{value_dim}, {sizes.tokens} of {n_kv} tokens, {n_q}"}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ATTENTION(q, k, v, [], [], [], [index, count], p.scale, text)[0]
        return out

    def forward() -> Row:
        with torch.no_grad():
            ms, out = median_ms(lambda: call(*p.inputs)), call(*p.inputs)
        tflops = 2 * (dim + value_dim) * p.pairs / ms / 1e9
        return {"forward_ms": ms, "forward_tflops": tflops, **errors(p, out)}

    yield attempt({**names, "by": "ours, forward"}, forward)
    yield attempt({**names, "by": "ours, with gradients"}, lambda: measure(p, call))

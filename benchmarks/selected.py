"""Attention over selected keys: training shapes with random causal selections, and decoding.

    python -m benchmarks.selected --out selected.json

Results of sampled queries are compared with fp64 in the same run. Times are medians.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from benchmarks.environment import write_json
from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.triton.selected import executor
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.layout.listed import places
from sparse_compile.selection import canonical
from sparse_compile.spec import AttentionSpec

Row = dict[str, Any]
Q_HEADS, KV_HEADS, DIM = 64, 4, 128
SAMPLED = 64


def median_ms(run: Callable[[], Any], rep: int = 100) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=25, rep=rep, return_mode="median"))


def operands(batch: int, n_q: int, n_kv: int, device: str = "cuda") -> list[Tensor]:
    """q, k and v in bf16, stored as a projection leaves them."""
    shapes = ((n_q, Q_HEADS), (n_kv, KV_HEADS), (n_kv, KV_HEADS))
    made = [torch.randn(batch, n, h, DIM, device=device).bfloat16() for n, h in shapes]
    return [t.transpose(1, 2) for t in made]


def random_causal(n: int, unit: int, most: int, device: str = "cuda") -> Tensor:
    """int64 [1, KV_HEADS, n, most]: for each query, random units up to its own."""
    own = torch.arange(n, device=device) // unit
    return (torch.rand(1, KV_HEADS, n, most, device=device) * (own + 1)[:, None]).long()


def worst_error(
    inputs: Sequence[Tensor], lists: tuple[Tensor, Tensor], unit: int, out: Tensor
) -> float:
    """The largest error of sampled queries against fp64, relative to the largest value."""
    q, k, v = inputs
    group, worst, most = Q_HEADS // KV_HEADS, 0.0, 0.0
    for token in torch.linspace(0, q.shape[2] - 1, SAMPLED).long().tolist():
        for head in range(KV_HEADS):
            chosen = lists[0][0, head, token, : int(lists[1][0, head, token])].long()
            keys = (chosen[:, None] * unit + torch.arange(unit, device="cuda")).flatten()
            keys = keys[keys <= token]
            own = slice(head * group, (head + 1) * group)
            scores = q[0, own, token].double() @ k[0, head, keys].double().T * DIM**-0.5
            wanted = scores.softmax(-1) @ v[0, head, keys].double()
            worst = max(worst, float((out[0, own, token] - wanted).abs().max()))
            most = max(most, float(wanted.abs().max()))
    return worst / most


def training(n: int, unit: int, most: int) -> Row:
    """Forward, backward and the lists of one selection."""
    inputs, spec = operands(1, n, n), AttentionSpec.of_units(MaskExpr(KV <= Q), 1, unit)
    index, units = random_causal(n, unit, most), n // unit
    lists = canonical(index, units)
    call = AttentionCall(*inputs, [], [], lists, DIM**-0.5, spec)
    out, lse = executor.forward(call)
    result = AttentionResult(out, lse, torch.randn_like(out))
    pairs = float(lists[1].double().sum()) * unit * (Q_HEADS // KV_HEADS)
    row: Row = {
        "case": f"{n} tokens, top {most} of units of {unit}",
        "forward_ms": median_ms(lambda: executor.forward(call)),
        "backward_ms": median_ms(lambda: executor.backward(call, result)),
        "canonical_ms": median_ms(lambda: canonical(index, units)),
        "transposed_ms": median_ms(lambda: places(*lists, units, 16384)),
        "relative_error": worst_error(inputs, lists, unit, out),
    }
    for name, products in (("forward", 4), ("backward", 10)):
        row[f"{name}_tflops"] = products * pairs * DIM / row[f"{name}_ms"] / 1e9
    return row


def decoding(batch: int, n: int, unit: int, most: int) -> Row:
    """One query for each sequence, replayed in a CUDA graph, against dense SDPA."""
    q, k, v = operands(batch, 1, n)
    orders = [torch.randperm(n // unit, device="cuda")[:most] for _ in range(batch * KV_HEADS)]
    index = torch.stack(orders).view(batch, KV_HEADS, 1, most)
    lists = canonical(index, n // unit)
    spec = AttentionSpec.of_units(MaskExpr(sympy.true), 1, unit)
    call = AttentionCall(q, k, v, [], [], lists, DIM**-0.5, spec)
    run = functools.partial(executor.forward, call)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    ms = median_ms(graph.replay)
    copied = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda")
    to = torch.empty_like(copied)
    copy = 2 * copied.nbytes / median_ms(lambda: to.copy_(copied)) / 1e6
    rate = batch * KV_HEADS * most * unit * DIM * 4 / ms / 1e6
    dense = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, q, k, v, enable_gqa=True
    )
    return {
        "case": f"decoding, {batch} sequences of {n}, top {most} of units of {unit}",
        "graph_ms": ms,
        "selected_gb_per_s": rate,
        "copy_gb_per_s": copy,
        "share_of_copy": rate / copy,
        "sdpa_dense_ms": median_ms(dense),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--n", type=int, default=65536)
    parser.add_argument("--out", help="path of the JSON file")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    cases: list[Callable[[], Row]] = [
        functools.partial(training, args.n, 64, 16),
        functools.partial(training, args.n, 128, 8),
        functools.partial(decoding, 64, 2 * args.n, 64, 64),
        functools.partial(decoding, 1, 2 * args.n, 64, 64),
    ]
    rows: list[Row] = []
    for case in cases:
        rows.append(case())
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else v for k, v in rows[-1].items()))
        if args.out:
            shape = {"q_heads": Q_HEADS, "kv_heads": KV_HEADS, "dim": DIM, "dtype": "bfloat16"}
            write_json(args.out, rows, problem=shape)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

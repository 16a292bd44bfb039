"""Our Triton kernels and compiled FlexAttention, side by side, each checked before it is timed.

    python -m benchmarks.kernels --out benchmarks/results/kernels_h200.json

Every output and gradient must be as close to an fp32 dense reference as dense eager attention in
the same precision is (times 1.1); otherwise nothing is reported.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from benchmarks.environment import write_json
from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.triton.blocks import executor
from sparse_compile.expr import KV, MaskExpr, Q, evaluate, table
from sparse_compile.layout import Layout, build_layout, superset
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.spec import AttentionSpec

DOCUMENT = table(0)
MASKS = {
    "causal": MaskExpr(KV <= Q),
    "window": MaskExpr((KV <= Q) & (Q - KV < 1024)),
    "documents": MaskExpr((KV <= Q) & sympy.Eq(DOCUMENT(Q), DOCUMENT(KV)), ("int32",)),
}
NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Problem:
    """Inputs of one comparison, with the true results and what eager bf16 makes of them."""

    mask: MaskExpr
    tables: list[Tensor]
    inputs: tuple[Tensor, Tensor, Tensor]
    grad_out: Tensor
    truth: tuple[Tensor, ...]
    allowed: tuple[float, ...]


def problem(name: str, n: int, heads: int, dim: int) -> Problem:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad_out = (
        torch.randn(1, heads, n, dim, device="cuda", dtype=torch.bfloat16, generator=generator)
        for _ in range(4)
    )
    mask = MASKS[name]
    position = torch.arange(n, device="cuda", dtype=torch.int32)
    tables = [position // 1024] if mask.tables else []
    keep = evaluate(mask, {"q": position[:, None], "kv": position[None]}, n, n, tables)
    results = [dense(*args, keep, torch.float32) for args in by_head(q, k, v, grad_out)]
    eager = [dense(*args, keep, torch.bfloat16) for args in by_head(q, k, v, grad_out)]
    truth = tuple(torch.stack(parts)[None] for parts in zip(*results, strict=True))
    errors = (
        relative_error(torch.stack(parts)[None], true)
        for parts, true in zip(zip(*eager, strict=True), truth, strict=True)
    )
    return Problem(mask, tables, (q, k, v), grad_out, truth, tuple(1.1 * e for e in errors))


def by_head(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t[0].unbind(0) for t in tensors), strict=True))


def dense(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, keep: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Output and gradients of one head, by dense matrices in ``dtype``."""
    inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    scores = inputs[0] @ inputs[1].mT * q.shape[-1] ** -0.5
    out = scores.masked_fill(~keep, float("-inf")).softmax(-1) @ inputs[2]
    return out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(dtype))


def relative_error(value: Tensor, truth: Tensor) -> float:
    error = (value.float() - truth.float()).norm() / truth.float().norm()
    return float("inf") if error.isnan() else error.item()


Pair = tuple[Callable[[], Any], Callable[[], Any], tuple[Tensor, ...]]


def ours(p: Problem, block: int) -> Pair:
    """Forward and backward of the generated kernels as they are launched, and their results."""
    spec = AttentionSpec(p.mask, block_q=block, block_kv=block)
    _, heads, n, dim = p.inputs[0].shape
    layout = build_layout(
        superset.Problem.of(p.mask, ProblemShape(1, heads, n, n), (block, block)),
        p.tables,
        device="cuda",
    )
    blocks = Layout(spec, (layout,), 1, heads)
    call = AttentionCall(*p.inputs, p.tables, [], [], dim**-0.5, spec, layout=blocks)

    def forward() -> tuple[Tensor, Tensor]:
        return executor.forward(call)

    out, lse = forward()

    def backward() -> tuple[Tensor, ...]:
        return executor.backward(call, AttentionResult(out, lse, p.grad_out))

    return forward, backward, (out, *backward())


def flex(p: Problem, name: str, mode: str) -> Pair:
    """The same of compiled FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = p.inputs[0].shape[2]
    document = p.tables[0] if p.tables else None
    mods = {
        "causal": lambda b, h, i, j: i >= j,
        "window": lambda b, h, i, j: (i >= j) & (i - j < 1024),
        "documents": lambda b, h, i, j: (i >= j) & (document[i] == document[j]),
    }
    block_mask = create_block_mask(mods[name], None, None, n, n, device="cuda")
    torch._dynamo.reset()
    compiled = torch.compile(
        functools.partial(flex_attention, block_mask=block_mask),
        mode=None if mode == "default" else mode,
    )
    inputs = [t.detach().clone().requires_grad_() for t in p.inputs]
    out = compiled(*inputs)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, p.grad_out, retain_graph=True)

    return lambda: compiled(*inputs), backward, (out.detach(), *backward())


def measured(name: str, label: str, p: Problem, pair: Pair) -> dict[str, Any]:
    """One row of the result; raises when a result is not as accurate as eager attention."""
    from triton.testing import do_bench

    forward, backward, results = pair
    errors = [relative_error(r, t) for r, t in zip(results, p.truth, strict=True)]
    for what, error, allowed in zip(NAMES, errors, p.allowed, strict=True):
        if not error <= allowed:
            raise ArithmeticError(f"{label}, {name}: {what} error {error:.2e} > {allowed:.2e}")
    row: dict[str, Any] = {"mask": name, "implementation": label}
    for direction, run in (("forward", forward), ("backward", backward)):
        quantiles = do_bench(run, warmup=50, rep=200, quantiles=[0.2, 0.5, 0.8])
        row |= {f"{direction}_ms": quantiles[1], f"{direction}_ms_p20_p80": quantiles[::2]}
    row["errors"] = dict(zip(NAMES, errors, strict=True))
    row["allowed"] = dict(zip(NAMES, p.allowed, strict=True))
    print(
        f"{name:10} {label:40} forward {row['forward_ms']:.3f} ms  "
        f"backward {row['backward_ms']:.3f} ms  errors {[f'{e:.1e}' for e in errors]}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="path of the JSON file")
    parser.add_argument("--masks", nargs="+", default=list(MASKS), choices=list(MASKS))
    parser.add_argument("--blocks", nargs="+", type=int, default=[128], help="layout blocks")
    parser.add_argument("--flex", nargs="*", default=["default", "max-autotune-no-cudagraphs"])
    parser.add_argument("--n", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    shape = {"batch": 1, "heads": args.heads, "n": args.n, "dim": args.dim, "dtype": "bfloat16"}
    for name in args.masks:
        p = problem(name, args.n, args.heads, args.dim)
        for block in args.blocks:
            label = f"sparse_compile, {block}x{block} layout"
            rows.append(measured(name, label, p, ours(p, block)))
        for mode in args.flex:
            rows.append(measured(name, f"flex_attention, {mode}", p, flex(p, name, mode)))
        write_json(args.out, rows, problem=shape)


if __name__ == "__main__":
    main()

"""Causal sliding-window attention on the CPU: the executor and its peers, side by side in one run.

Peers: compiled flex_attention (forward only: it has no CPU backward) and SDPA with a dense bool
mask; with ``--compiled`` also ``torch.compile(backend="sparse_compile")`` of that SDPA call. Before
anything is timed, sampled rows of every peer are checked against the fp64 reference. Repeats
interleave, so that a busy machine disturbs all peers alike.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.environment import write_json
from sparse_compile import reference
from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.cpu import executor
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.layout import Layout, build_layout
from sparse_compile.layout.superset import Problem, ProblemShape
from sparse_compile.spec import AttentionSpec

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def window_mask(n: int, window: int, rows: Tensor | None = None) -> Tensor:
    q, kv = (torch.arange(n) if rows is None else rows).view(-1, 1), torch.arange(n)
    return (kv <= q) & (q - kv < window)


class Executor(torch.autograd.Function):
    """The CPU executor as a differentiable function."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, data: tuple[Any, ...]) -> Tensor:
        out, lse = executor.forward(call_of(q, k, v, data))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.data = data
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        result = AttentionResult(out, lse, grads[0])
        return *executor.backward(call_of(q, k, v, ctx.data), result), None


def call_of(q: Tensor, k: Tensor, v: Tensor, data: tuple[Any, ...]) -> AttentionCall:
    layout, scale, spec = data
    return AttentionCall(q, k, v, (), (), (), scale, spec, layout=layout)


def ours(args: argparse.Namespace) -> Attend:
    mask = MaskExpr((KV <= Q) & (Q - KV < args.window))
    spec = AttentionSpec(mask, block_q=args.block, block_kv=args.block)
    layout = build_layout(
        Problem.of(mask, ProblemShape(1, args.heads, args.n, args.n), (args.block, args.block))
    )
    data = (Layout(spec, (layout,), 1, args.heads), args.dim**-0.5, spec)
    return lambda q, k, v: Executor.apply(q, k, v, data)


def sdpa(args: argparse.Namespace) -> Attend:
    mask = window_mask(args.n, args.window)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex(args: argparse.Namespace) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def allowed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (q - kv < args.window)

    block_mask = create_block_mask(allowed, None, None, args.n, args.n, device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def whole_backend(args: argparse.Namespace) -> Attend:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(args.n)
        q_at, kv_at = position.view(-1, 1), position
        mask = (kv_at <= q_at) & (q_at - kv_at < args.window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return torch.compile(program, backend="sparse_compile")


FORWARD: dict[str, Callable[[argparse.Namespace], Attend]] = {
    "sparse_compile executor": ours,
    "flex_attention, compiled": flex,
    "SDPA, dense bool mask": sdpa,
}
TRAINING = {name: make for name, make in FORWARD.items() if make is not flex}


def operands(args: argparse.Namespace, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, [1, H, N, D]."""
    torch.manual_seed(0)
    return [torch.randn(1, args.heads, args.n, args.dim).to(dtype) for _ in range(4)]


def sampled_errors(
    args: argparse.Namespace, tensors: list[Tensor], out: Tensor, dq: Tensor | None
) -> dict[str, float]:
    """Relative errors of some rows of the output, and of dQ, against fp64."""
    rows = torch.linspace(0, args.n - 1, args.sampled_rows).long().unique()
    q, k, v, grad = tensors
    leaf = q[:, :, rows].double().requires_grad_()
    want, _ = reference.attention(leaf, k, v, window_mask(args.n, args.window, rows))
    pairs = {"out": (out[:, :, rows], want.detach())}
    if dq is not None:
        (want_dq,) = torch.autograd.grad(want, leaf, grad[:, :, rows].double())
        pairs["dq"] = (dq[:, :, rows], want_dq)
    return {
        name: ((got.double() - truth).norm() / truth.norm()).item()
        for name, (got, truth) in pairs.items()
    }


def inference(attend: Attend, tensors: list[Tensor]) -> tuple[Tensor, None]:
    with torch.no_grad():
        return attend(*tensors[:3]), None


def training(attend: Attend, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = attend(*leaves)
    dq, _, _ = torch.autograd.grad(out, leaves, tensors[3])
    return out.detach(), dq


def interleaved(
    runs: dict[str, Callable[[], Any]],
    clock: Callable[[], float],
    repeats: int,
    slow_repeats: int,
) -> dict[str, list[float]]:
    """Milliseconds of every run; those over a second repeat ``slow_repeats`` times."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats):
        for name, run in runs.items():
            if i >= slow_repeats and min(times[name]) > 1000:
                continue
            start = clock()
            run()
            times[name].append((clock() - start) * 1e3)
    return times


def compare(
    args: argparse.Namespace, dtype: torch.dtype, what: str, runner: Callable[..., Any]
) -> list[dict[str, Any]]:
    """Check, then time, all peers; one row each."""
    torch._dynamo.reset()
    tensors = operands(args, dtype)
    runs, rows = {}, []
    for name, make in (FORWARD if what == "forward" else TRAINING).items():
        attend = make(args)
        run = functools.partial(runner, attend, tensors)
        errors = sampled_errors(args, tensors, *run())
        rows.append({"what": what, "dtype": str(dtype)[6:], "peer": name, "errors": errors})
        runs[name] = run
    dense = next(row["errors"] for row in rows if row["peer"].startswith("SDPA"))
    for row in rows:
        for key, error in row["errors"].items():
            assert error <= (1e-5 if dtype == torch.float32 else 1.1 * dense[key]), row
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    times = interleaved(runs, clock, args.repeats, args.slow_repeats)
    fastest = {name: min(values) for name, values in times.items()}
    for row in rows:
        row["min_ms"] = fastest[row["peer"]]
        row["median_ms"] = statistics.median(times[row["peer"]])
        row["speedup_of_executor"] = row["min_ms"] / fastest["sparse_compile executor"]
        print(
            f"{what:18} {row['dtype']:9} {row['peer']:26} min {row['min_ms']:9.1f} ms  "
            f"median {row['median_ms']:9.1f} ms  executor is {row['speedup_of_executor']:5.2f}x  "
            + "  ".join(f"{key} {error:.1e}" for key, error in row["errors"].items()),
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time of this process, for one thread on a busy machine",
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--slow-repeats", type=int, default=3)
    parser.add_argument("--sampled-rows", type=int, default=64)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--what", default="forward,forward+backward")
    parser.add_argument("--compiled", action="store_true", help="also time the whole backend")
    parser.add_argument("--out", default="cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.compiled:
        FORWARD["sparse_compile backend"] = TRAINING["sparse_compile backend"] = whole_backend
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes.split(","):
        for what in args.what.split(","):
            runner = inference if what == "forward" else training
            rows += compare(args, getattr(torch, dtype), what, runner)
            write_json(args.out, rows, config=vars(args))


if __name__ == "__main__":
    main()

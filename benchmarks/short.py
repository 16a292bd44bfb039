"""Short problems and generation through torch.compile: this backend and Inductor, side by side.

    python -m benchmarks.short --out short.json
    python -m benchmarks.short --device cuda --dtype bfloat16 --dim 64 --heads 16 --out short.json

The question is whether a model is ever slower with this backend than it was without: every cell is
a mask, a length and a batch, forward and training step; a row of generation is one token against a
cache. Samples of both interleave, and medians are compared, so that a busy machine disturbs both
alike. What was decided, and by which predictions, stands in each row.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from benchmarks.environment import settings, write_json
from sparse_compile.options import Options
from sparse_compile.passes import pipeline
from sparse_compile.sites.plan import Plan

Program = Callable[..., Tensor]
Row = dict[str, Any]
WINDOW, DOCUMENT = 128, 256
#: Tokens that a growing cache grows by before it starts anew.
_GROWN = 2048


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def _near(q: Tensor, k: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2], device=q.device)[:, None]
    j = torch.arange(k.shape[-2], device=q.device)[None]
    return (j <= i) & (i - j < WINDOW)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A causal window, computed by the program."""
    return _sdpa(q, k, v, _near(q, k))


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same window around a softmax that the program writes out."""
    return _written_out(q, k, v, _near(q, k))


def documents(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Causal in each document."""
    i = torch.arange(q.shape[-2], device=q.device)
    mask = (i[None] <= i[:, None]) & (ids[:, None] == ids[None])
    return _sdpa(q, k, v, mask)


def given(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A mask tensor from outside."""
    return _sdpa(q, k, v, mask)


def data(mask: str, n: int, batch: int, device: str) -> tuple[Tensor, ...]:
    """What the program of a mask takes besides q, k and v."""
    random = torch.Generator().manual_seed(n)
    if mask == "documents":
        return ((torch.arange(n) // DOCUMENT).to(device),)
    if mask == "windows":
        kept = torch.rand(batch, 1, 1, n, generator=random) < 0.6
        return ((kept | torch.eye(n, dtype=torch.bool)).to(device),)
    if mask == "edges":
        edges = torch.rand(n, n, generator=random) < 8 / n
        return ((edges | torch.eye(n, dtype=torch.bool)).to(device),)
    return ()


PROGRAMS: dict[str, Program] = {
    "window": window,
    "written-out": written_out,
    "documents": documents,
    "edges": given,
}


def static_cache(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    """One token against a cache of fixed length; its position is a tensor."""
    j = torch.arange(k.shape[-2], device=q.device)
    mask = (j <= at) & (j > at - WINDOW * 8)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], enable_gqa=True)


def growing_cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One token against all before it."""
    t = k.shape[-2]
    i = torch.arange(t - q.shape[-2], t, device=q.device)[:, None]
    j = torch.arange(t, device=q.device)[None]
    mask = (j <= i) & (j > i - 48)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def step(program: Program, *args: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward."""
    out = program(*args)
    return torch.autograd.grad(out, args[:3], torch.ones_like(out))


def decision(
    program: Program, args: Sequence[Tensor], options: dict[str, Any], dynamic: bool = False
) -> Row:
    """What the library decides for the attention of a program, and why."""
    found: list[Any] = []

    def look(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.extend(t.decided for t in pipeline.plan(gm, inputs, Options.parse(options)))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(program, backend=look, dynamic=dynamic)(*args)
    torch._dynamo.reset()
    rewritten = bool(found) and isinstance(found[0], Plan)
    return {"rewritten": rewritten, "reason": found[0].reason if found else "no attention found"}


def sampled(call: Callable[[], Any], args: argparse.Namespace) -> float:
    """Milliseconds of a call, on average over about ``args.seconds``."""
    wait = torch.cuda.synchronize if args.device == "cuda" else (lambda: None)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    wait()
    start, count = clock(), 0
    while True:
        call()
        count += 1
        if count % 4 == 0 or clock() - start > args.seconds:
            wait()
            if (spent := clock() - start) > args.seconds:
                return spent * 1e3 / count


def interleaved(calls: dict[str, Callable[[], Any]], args: argparse.Namespace) -> Row:
    """The median of each call, and the ratio of the second to the first."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(args.samples):
        for name, call in calls.items():
            times[name].append(sampled(call, args))
    medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    inductor, ours = medians.values()
    return {**medians, "ratio": ours / inductor}


def compiled(program: Program, args: argparse.Namespace) -> dict[str, Program]:
    """By Inductor, and by this backend."""
    torch._dynamo.reset()
    ours = functools.partial(torch.compile, backend="sparse_compile", options=args.options or None)
    return {"inductor": torch.compile(program), "ours": ours(program)}


def operands(args: argparse.Namespace, batch: int, n: int, n_kv: int, groups: int = 1) -> Any:
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    shapes = [(args.heads, n), (args.heads // groups, n_kv), (args.heads // groups, n_kv)]
    return [torch.randn(batch, h, m, args.dim, device=args.device, dtype=dtype) for h, m in shapes]


def cells(args: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Masks, lengths and batches."""
    found = [(m, n, b) for m in args.masks for n in args.n for b in args.batch if m != "windows"]
    windows = [("windows", 64, b) for b in (16, 128)] if "windows" in args.masks else []
    return found + windows


def measured(cell: tuple[str, int, int], args: argparse.Namespace) -> list[Row]:
    """The rows of a cell: forward and step."""
    mask, n, batch = cell
    program = PROGRAMS.get(mask, given)
    extra = data(mask, n, batch, args.device)
    leaves = operands(args, batch, n, n)
    rows = []
    for what in args.what:
        inputs = [x.requires_grad_(what == "step") for x in leaves] + [*extra]
        run = {
            name: functools.partial(step, call, *inputs)
            if what == "step"
            else functools.partial(call, *inputs)
            for name, call in compiled(program, args).items()
        }
        row = {"mask": mask, "n": n, "batch": batch, "what": what}
        rows.append({**row, **interleaved(run, args), **decision(program, inputs, args.options)})
    return rows


def generated(kind: str, n: int, args: argparse.Namespace) -> Row:
    """The row of one token against a cache of ``n`` keys."""
    q, k, v = operands(args, 1, 1, n + _GROWN, min(args.groups, args.heads))
    at, run = torch.tensor(n - 1, device=args.device), {}
    grown = range(n - 2, n + _GROWN)
    for name, call in compiled(static_cache if kind == "static" else growing_cache, args).items():
        if kind == "static":
            run[name] = functools.partial(call, q, k[:, :, :n], v[:, :, :n], at)
        else:
            run[name] = functools.partial(_next, call, itertools.cycle(grown), q, k, v)
    row = {"mask": f"{kind} cache", "n": n, "batch": 1, "what": "token"}
    with torch.no_grad():
        times = interleaved(run, args)
        if kind == "static":
            why = decision(static_cache, (q, k[:, :, :n], v[:, :, :n], at), args.options)
        else:
            why = decision(growing_cache, (q, k, v), args.options, dynamic=True)
    return {**row, **times, **why}


def _next(program: Program, lengths: Iterator[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A token with one key more than the last: most lengths are new."""
    t = next(lengths)
    return program(q, k[:, :, :t], v[:, :, :t])


def line(row: Row) -> str:
    """What is printed of a row."""
    cell = f"{row['mask']:13} n={row['n']:<6} b={row['batch']:<3} {row['what']:7}"
    times = f"inductor {row['inductor_ms']:9.3f}  ours {row['ours_ms']:9.3f}"
    shown = "rewritten" if row["rewritten"] else "dense"
    return f"{cell} {times}  {row['ratio']:6.2f}  {shown}: {row['reason'][:100]}"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=4, help="query heads to a key head of caches")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--n", type=int, nargs="*", default=[64, 256, 1024, 4096])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--masks", nargs="*", default=[*PROGRAMS, "windows"])
    parser.add_argument("--what", nargs="+", default=["forward", "step"])
    parser.add_argument("--cache", type=int, nargs="*", default=[128, 1024, 8192, 32768])
    parser.add_argument("--caches", nargs="*", default=["static", "growing"])
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.05, help="of each sample, at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time of this process, for one thread on a busy machine",
    )
    parser.add_argument("--decide", choices=["cost", "sparse"], help="as the backend's option")
    parser.add_argument("--out", default="short.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    args.options = {"decide": args.decide} if args.decide else {}
    torch.set_num_threads(args.threads)
    rows: list[Row] = []

    def keep(found: list[Row]) -> None:
        rows.extend(found)
        for row in found:
            print(line(row), flush=True)
        ratios = [row["ratio"] for row in rows]
        summary = {"median": statistics.median(ratios), "worst": max(ratios)}
        write_json(args.out, rows, config=settings(args), ratio=summary)

    for cell in cells(args):
        keep(measured(cell, args))
    for kind in args.caches:
        for n in args.cache:
            keep([generated(kind, n, args)])
    if rows:
        ratios = [row["ratio"] for row in rows]
        print(f"median {statistics.median(ratios):.2f}, worst {max(ratios):.2f}")


if __name__ == "__main__":
    main()

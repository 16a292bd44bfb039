"""Blocks of 128 queries that select blocks of 128 keys: kernels of blocks beside those of units.

    python -m benchmarks.listed --out listed.json

The same calls of attention(), with and without the choice of the kernels of blocks; results are
compared before anything is timed. Times are medians on the device's clock, of calls in turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import sparse_compile
from benchmarks.environment import write_json
from sparse_compile import patterns as P
from sparse_compile.api import plan
from sparse_compile.selection import canonical
from sparse_compile.spec import are_blocks

DIM, BLOCK, SHARE = 128, 128, 0.1
Row = dict[str, Any]


def problem(n: int, heads: int, kv_heads: int) -> tuple[list[Tensor], Tensor, P.Pattern]:
    """q, k and v, the gradient of the output, and a random causal selection of a tenth."""
    shapes = (heads, kv_heads, kv_heads, heads)
    made = [torch.randn(1, n, h, DIM, device="cuda").bfloat16().transpose(1, 2) for h in shapes]
    units = n // BLOCK
    own = torch.arange(units, device="cuda")
    most = max(1, int(SHARE * units))
    chosen = torch.rand(1, kv_heads, units, most, device="cuda") * (own + 1)[:, None]
    index, count = canonical(chosen.long(), units)
    mask = P.Causal() & P.Selected(index, BLOCK, unit_q=BLOCK, count=count)
    return [t.requires_grad_() for t in made[:3]], made[3], mask


def ms(run: Callable[[], Any]) -> float:
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    ends[0].record()
    run()
    ends[1].record()
    torch.cuda.synchronize()
    return ends[0].elapsed_time(ends[1])


def measured(n: int, heads: int, kv_heads: int, rounds: int = 7) -> Row:
    inputs, grad, mask = problem(n, heads, kv_heads)

    def forward() -> Tensor:
        return sparse_compile.attention(*inputs, mask)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, grad, retain_graph=True)

    ways = {"blocks": are_blocks, "units": lambda *_: False}
    outs, times = {}, {}
    for name, choose in ways.items():
        plan.are_blocks = choose
        plan.planned.cache_clear()
        outs[name] = forward()
        backward(outs[name])
    torch.testing.assert_close(outs["blocks"], outs["units"], atol=2e-2, rtol=2e-2)
    for _ in range(rounds):
        for name, choose in ways.items():
            plan.are_blocks = choose
            plan.planned.cache_clear()
            forward()
            times.setdefault(f"{name}_forward_ms", []).append(ms(forward))
            out = outs[name]
            times.setdefault(f"{name}_backward_ms", []).append(ms(lambda out=out: backward(out)))
    plan.are_blocks = are_blocks
    plan.planned.cache_clear()
    found = {name: statistics.median(values) for name, values in times.items()}
    return {"n": n, "heads": heads, "kv_heads": kv_heads, **found}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", help="path of the JSON file")
    args = parser.parse_args(argv)
    rows = []
    for shape in ((65536, 64, 4), (16384, 16, 1), (32768, 16, 4), (8192, 16, 4)):
        rows.append(measured(*shape))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
        if args.out:
            write_json(args.out, rows, dim=DIM, block=BLOCK, share=SHARE, dtype="bfloat16")


if __name__ == "__main__":
    main()

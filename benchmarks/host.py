"""What a compiled call costs on the host, beside compiled FlexAttention; and inside a CUDA graph.

    python -m benchmarks.host --out host.json

Host time is how long a call takes to return while the device still works: calls are issued in
bursts that the device's queue holds, and the device is waited for between them. The two
implementations take turns. With ``mode="reduce-overhead"`` the wall time of a call is set beside
the sum of the times of its kernels, which the profiler reads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_compile  # noqa: F401  # registers the backend
from benchmarks.environment import write_json

HEADS, DIM, WINDOW = 16, 64, 256
LENGTHS = (1024, 2048, 4096, 8192)
BURST, ROUNDS = 20, 40
#: Of the model that is recorded.
LAYERS = 12
Call = Callable[[Tensor, Tensor, Tensor], Tensor]
Row = dict[str, Any]


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in a causal window, as a model writes it."""
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(k.shape[2], device=q.device)[None]
    keep = (j <= i) & (i - j < WINDOW)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def flex(n: int) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < WINDOW)

    blocks = create_block_mask(near, None, None, n, n, device="cuda")
    return torch.compile(lambda q, k, v: flex_attention(q, k, v, block_mask=blocks), dynamic=False)


def ours(mode: str | None = None) -> Call:
    return torch.compile(
        masked, backend="sparse_compile", mode=mode, options=None if mode else {}, dynamic=False
    )


def inputs(n: int, batch: int = 1) -> list[Tensor]:
    shape = (batch, n, HEADS, DIM)
    made = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    return [t.transpose(1, 2).requires_grad_() for t in made]


def burst_us(run: Callable[[], Any]) -> float:
    """Host microseconds of a call, the mean of a burst."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(BURST):
        run()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / BURST * 1e6


def runs(call: Call, tensors: list[Tensor]) -> dict[str, Callable[[], Any]]:
    grad = torch.randn_like(tensors[0])

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*tensors)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*tensors), tensors, grad)

    return {"forward": forward, "forward + backward": step}


def compared(n: int) -> list[Row]:
    """Host time of both, forward and forward + backward; they must agree first."""
    torch._dynamo.reset()
    tensors = inputs(n)
    sides = {"ours": runs(ours(), tensors), "flex": runs(flex(n), tensors)}
    torch.testing.assert_close(
        sides["ours"]["forward"](), sides["flex"]["forward"](), atol=3e-2, rtol=3e-2
    )
    rows = []
    for kind in sides["ours"]:
        times: dict[str, list[float]] = {label: [] for label in sides}
        for label in sides:
            burst_us(sides[label][kind])
        for turn in range(ROUNDS):
            for label in sides if turn % 2 else reversed(sides):
                times[label].append(burst_us(sides[label][kind]))
        found = {f"{label}_us": statistics.median(values) for label, values in times.items()}
        rows.append({"n": n, "run": kind, **found, "ratio": found["ours_us"] / found["flex_us"]})
    return rows


class Block(torch.nn.Module):
    """A layer of a transformer, whose attention is in a window."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * DIM
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(2))
        self.projections = torch.nn.Linear(width, 3 * width)
        self.back = torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.projections(self.norms[0](x)).unflatten(-1, (3, HEADS, DIM))
        attended = masked(*mixed.transpose(1, 3).unbind(2))
        x = x + self.back(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def recorded(n: int) -> list[Row]:
    """Wall time of calls in CUDA graphs, and of their kernels."""
    torch._dynamo.reset()
    return recorded_runs(n, "attention", runs(ours("reduce-overhead"), inputs(n)))


def recorded_model(n: int) -> list[Row]:
    """The same of a model of some layers."""
    torch._dynamo.reset()
    with torch.device("cuda"):
        model = torch.nn.Sequential(*(Block() for _ in range(LAYERS))).bfloat16()
        x = torch.randn(1, n, HEADS * DIM, dtype=torch.bfloat16)
    compiled = torch.compile(
        model, backend="sparse_compile", mode="reduce-overhead", dynamic=False, fullgraph=True
    )

    def forward() -> Tensor:
        with torch.no_grad():
            return compiled(x)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        compiled(x).backward(x)

    found = {"forward": forward, "forward + backward": step}
    return recorded_runs(n, f"model of {LAYERS} layers", found)


def recorded_runs(n: int, what: str, calls: dict[str, Callable[[], Any]]) -> list[Row]:
    rows = []
    for kind, run in calls.items():
        for _ in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            run()
        kernels = kernels_us(run)
        walls = []
        for _ in range(100):
            torch.compiler.cudagraph_mark_step_begin()
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            walls.append((time.perf_counter() - start) * 1e6)
        skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        wall, busy = statistics.median(walls), device_us(run)
        rows.append(
            {"n": n, "run": f"{what}, {kind}, reduce-overhead", "wall_us": wall, "device_us": busy}
            | {"kernels_us": kernels, "ratio": wall / kernels, "in_a_stream": busy / kernels}
            | {"cudagraph_skips": skips}
        )
    return rows


def device_us(run: Callable[[], Any]) -> float:
    """Microseconds between the ends of calls issued one after another."""
    times = []
    for _ in range(20):
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        ends[0].record()
        for _ in range(BURST):
            torch.compiler.cudagraph_mark_step_begin()
            run()
        ends[1].record()
        torch.cuda.synchronize()
        times.append(ends[0].elapsed_time(ends[1]) * 1e3 / BURST)
    return statistics.median(times)


def kernels_us(run: Callable[[], Any]) -> float:
    """The sum of the times of the kernels of a call."""
    from torch.profiler import ProfilerActivity, profile

    calls = 10
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            torch.compiler.cudagraph_mark_step_begin()
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in found.key_averages()) / calls


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--out", help="path of the JSON file")
    args = parser.parse_args(argv)
    rows: list[Row] = []
    for measure in (compared, recorded, recorded_model):
        for n in args.n if measure is not recorded_model else args.n[-1:]:
            try:
                found = measure(n)
            except Exception as error:
                found = [{"n": n, "run": measure.__name__, "error": f"{error}"[:500]}]
            rows += found
            for row in found:
                print(row, flush=True)
            if args.out:
                write_json(args.out, rows, heads=HEADS, dim=DIM, window=WINDOW)


if __name__ == "__main__":
    main()

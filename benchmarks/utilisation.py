"""How busy our forward kernel keeps the multiprocessors, measured by clocks in its programs.

    python -m benchmarks.utilisation --n 65536 --out utilisation.json

utilisation: time in which a multiprocessor holds at least one program, over all multiprocessors and
the time from the first start to the last end. occupancy: the same counting each of two programs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CASES
from benchmarks.environment import write_json
from benchmarks.instrument import instrumented
from benchmarks.kernels import relative_error
from benchmarks.ours import ours

#: Programs that run at a time on one multiprocessor.
RESIDENT = 2
MASKS = ("longformer", "bigbird", "causal", "window", "strided")
Row = dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """Use of the multiprocessors in one launch, in nanoseconds.

    Attributes:
        makespan: from the first start to the last end.
        busy: with at least one program, summed over multiprocessors.
        resident: durations of all programs.
        longest: duration of the longest program.
    """

    makespan: int
    busy: int
    resident: int
    longest: int

    @staticmethod
    def of(clocks: Tensor) -> Usage:
        """From int64 [programs, 3]: start, end, multiprocessor.

        >>> Usage.of(torch.tensor([[0, 4, 0], [2, 6, 0], [8, 9, 0], [1, 9, 1]]))
        Usage(makespan=9, busy=15, resident=17, longest=8)
        """
        start, end, where = clocks.unbind(1)
        busy = 0
        for place in where.unique():
            here = where == place
            by_start = start[here].argsort()
            begin, until = start[here][by_start], end[here][by_start].cummax(0).values
            idle = (begin[1:] - until[:-1]).clamp(min=0).sum()
            busy += int(until[-1] - begin[0] - idle)
        lasted = end - start
        makespan = int(end.max() - start.min())
        return Usage(makespan, busy, int(lasted.sum()), int(lasted.max()))


def summary(launches: Sequence[Tensor], processors: int) -> Row:
    """The launches of one forward call taken together; each section is one."""
    usages = [Usage.of(clocks) for clocks in launches]
    time = sum(usage.makespan for usage in usages)
    both = torch.cat(list(launches))
    whole = int(both[:, 1].max() - both[:, 0].min())
    busy = sum(usage.busy for usage in usages)
    return {
        "utilisation": busy / (processors * time),
        "occupancy": sum(usage.resident for usage in usages) / (RESIDENT * processors * time),
        "utilisation_with_gaps": busy / (processors * whole),
        "by_launch": [usage.busy / (processors * usage.makespan) for usage in usages],
        "makespan_us": time / 1e3,
        "whole_us": whole / 1e3,
        "programs": sum(clocks.shape[0] for clocks in launches),
        "longest_program_us": max(usage.longest for usage in usages) / 1e3,
        "processors_used": int(both[:, 2].unique().numel()),
        "tick_ns": int(both[:, :2].flatten().unique().diff().min()),
    }


def measured(name: str, n: int, heads: int, dim: int, repeats: int) -> Row:
    from triton.testing import do_bench

    from sparse_compile.codegen.triton.blocks import executor

    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, n, dim, device="cuda", dtype=torch.bfloat16, generator=generator)
        for _ in range(3)
    )
    made = ours(CASES[name].pattern(n, "cuda"), n, heads)
    call = made.call(q, k, v)
    plain = executor.forward(call)[0]
    forward_ms = do_bench(lambda: executor.forward(call), return_mode="median")
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    with instrumented() as recorder:
        clocked = executor.forward(call)[0]
        assert relative_error(clocked, plain) < 1e-3, "clocks change no result"
        clocked_ms = do_bench(lambda: executor.forward(call), return_mode="median")
        recorder.take()
        found = []
        for _ in range(repeats):
            executor.forward(call)
            found.append(summary(recorder.take(), processors))
    found.sort(key=lambda row: row["utilisation"])
    values = [row["utilisation"] for row in found]
    row = {**found[len(found) // 2], "utilisation_all": [round(value, 4) for value in values]}
    times = {"forward_ms": forward_ms, "clocked_forward_ms": clocked_ms, "processors": processors}
    modelled = [
        work.utilisation(heads, RESIDENT * processors) if n <= 65536 else None
        for work in made.layout.schedules("q", heads, RESIDENT * processors, q.device)
    ]
    mean = statistics.fmean(row["occupancy"] for row in found)
    return {**times, **row, "occupancy_mean": mean, "modelled": modelled}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=[65536], help="lengths")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--only", nargs="+", default=list(MASKS), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", help="path of the JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    rows: list[Row] = []
    for n in args.n:
        for name in args.only:
            row: Row = {"mask": name, "n": n}
            try:
                row |= measured(name, n, args.heads, args.dim, args.repeats)
                shown = [f"{key} {row[key]:.3f}" for key in ("utilisation", "occupancy")]
                shown += [f"{key} {row[key]:.3f}" for key in ("forward_ms", "clocked_forward_ms")]
                shown += [f"longest program {row['longest_program_us']:.0f} us"]
            except Exception as error:  # the other masks are measured all the same
                row["error"] = f"{type(error).__name__}: {error}"[:600]
                shown = [row["error"]]
            print(f"{name:12} n={n} " + ", ".join(shown), flush=True)
            rows.append(row)
            if args.out:
                write_json(args.out, rows, heads=args.heads, dim=args.dim)


if __name__ == "__main__":
    main()

"""Our kernels, FlexAttention and FlashAttention-4 side by side on many masks, checked and timed.

    python -m benchmarks.patterns --n 16384 --peers flex fa4 --out patterns.json

Nothing is timed whose results are less accurate than :mod:`benchmarks.accuracy` allows. Results are
written after every mask; a part that fails is recorded and the others go on.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import ours, peers
from benchmarks.accuracy import Problem, Run, errors_of, problem
from benchmarks.cases import CASES
from benchmarks.environment import write_json

Maker = Callable[[Problem, bool], Run]
OURS: dict[str, Maker] = {"kernels": ours.kernels, "attention()": ours.whole_call}
PEERS: dict[str, Maker] = {
    "flex": peers.flex,
    "flex-autotuned": functools.partial(peers.flex, mode=peers.AUTOTUNED),
    "flex-flash": peers.flex_flash,
    "fa4": peers.fa4,
}
#: Products of a query, a key and the feature dimension: two in the forward, five in the backward.
_FLOPS = {"forward": 4, "backward": 10}
Row = dict[str, Any]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=[16384], help="lengths")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--backward", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--peers", nargs="*", default=["flex"], choices=list(PEERS))
    parser.add_argument("--out", help="path of the JSON file")
    parser.add_argument("--cold", action="store_true", help="time a call that makes its layout")
    parser.add_argument("--rep", type=int, default=100, help="milliseconds of each measurement")
    parser.add_argument(
        "--seconds-per-case", type=float, default=float("inf"), help="start nothing later than that"
    )
    return parser.parse_args(argv)


def timed(p: Problem, run: Run, rep: int) -> Row:
    """Milliseconds of forward and backward: the 20th, 50th and 80th percentile."""
    from triton.testing import do_bench

    row: Row = {}
    grad_out = run.native(p.grad_out)
    directions: list[tuple[str, Callable[[], Any]]] = [("forward", run.forward)]
    if run.backward is not None:
        directions.append(("backward", functools.partial(run.backward, grad_out)))
    for direction, call in directions:
        row[f"{direction}_ms"] = do_bench(call, warmup=25, rep=rep, quantiles=[0.2, 0.5, 0.8])
    return row


def measured(p: Problem, make: Maker, args: argparse.Namespace) -> Row:
    """The row of one implementation: times, or why there are none."""
    try:
        run = make(p, args.backward)
        errors = errors_of(p, run)
        return {**timed(p, run, args.rep), "errors": errors, **run.notes}
    except peers.NotExpressible as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # one failure must not end the comparison
        return {"error": f"{type(error).__name__}: {error}"[:600]}


def cold(p: Problem, with_flex: bool, rep: int) -> Row:
    """A call whose length was never seen before, against FlexAttention with its mask at hand."""
    from triton.testing import do_bench

    try:
        call = ours.cold_call(p)
        call()  # imports what holds caches
        forget, everything = ours.forgetter(), ours.forgetter(mask=True)
        row: Row = {
            "layout_and_forward_wall_ms": ours.wall_ms(call, forget),
            "with_mask_forgotten_too_wall_ms": ours.wall_ms(call, everything),
            "layout_known_forward_wall_ms": ours.wall_ms(ours.kernels(p, False).forward),
        }
        if with_flex:
            run = peers.flex(p, False).forward
            row["flex_forward_wall_ms"] = ours.wall_ms(run)
            row["flex_forward_ms"] = do_bench(run, rep=rep, return_mode="median")
        return row
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:600]}


def rows_of(name: str, n: int, args: argparse.Namespace) -> list[Row]:
    """All rows of one mask."""
    began = time.perf_counter()
    try:
        p = problem(CASES[name], n, args.heads, args.dim)
    except Exception as error:
        return [{"mask": name, "n": n, "error": f"{type(error).__name__}: {error}"[:600]}]
    makers: dict[str, Callable[[], Row]] = {
        label: functools.partial(measured, p, make, args)
        for label, make in {**OURS, **{peer: PEERS[peer] for peer in args.peers}}.items()
    }
    if args.cold:
        makers["cold"] = functools.partial(cold, p, "flex" in args.peers, args.rep)
    rows = []
    for label, make in makers.items():
        late = time.perf_counter() - began > args.seconds_per_case
        found = {"skipped": "no time left for this mask"} if late else make()
        seconds = round(time.perf_counter() - began, 1)
        rows.append({"mask": name, "n": n, "implementation": label, **found, "until_s": seconds})
        gc.collect()
    _add_rates(rows, args)
    return [{**row, "allowed_errors": p.allowed, "checked_queries": p.rows.numel()} for row in rows]


def _add_rates(rows: list[Row], args: argparse.Namespace) -> None:
    """Useful TFLOP/s: only pairs that the mask allows count."""
    pairs = next((r["allowed_pairs_per_head"] for r in rows if "allowed_pairs_per_head" in r), None)
    for row in rows:
        for direction, products in _FLOPS.items():
            if pairs and f"{direction}_ms" in row:
                flops = products * args.dim * pairs * args.heads
                row[f"{direction}_tflops"] = flops / row[f"{direction}_ms"][1] / 1e9


def line(rows: list[Row]) -> str:
    """What is printed of one mask."""
    parts = [f"{rows[0]['mask']:12} n={rows[0]['n']}"]
    for row in rows:
        label = row.get("implementation", "inputs")
        times = [f"{row[key][1]:.3f}" for key in ("forward_ms", "backward_ms") if key in row]
        walls = [f"{key[:-3]} {row[key]:.3f}" for key in row if key.endswith("wall_ms")]
        why = [f"{key}: {row[key][:90]}" for key in ("error", "skipped") if key in row]
        parts.append(f"{label} " + " / ".join(times + walls + why))
    return " | ".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    warnings.filterwarnings("ignore", module="torch")
    args = arguments(argv)
    shape = {"batch": 1, "heads": args.heads, "dim": args.dim, "dtype": "bfloat16"}
    rows: list[Row] = []
    for n in args.n:
        for name in args.only:
            found = rows_of(name, n, args)
            rows += found
            print(line(found), flush=True)
            if args.out:
                write_json(args.out, rows, problem=shape)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

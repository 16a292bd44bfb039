"""Two checkouts of this library side by side on one device: is nothing slower than it was?

    python -m benchmarks.against --base ../before --out against.json

Each checkout runs in a process of its own, on the same inputs, through the public names alone, so
that what moved inside does not matter. The processes take turns, row by row and round by round.
Results of both are compared with each other before anything is timed. A row's ratio is the median
over rounds of (before / now): above 1 is faster; its interval is a bootstrap over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Row = dict[str, Any]
HERE = Path(__file__).resolve().parents[1]
#: What two results may differ by, relative to the largest value: bf16 with sums in another order.
CLOSE = 2e-2
_WORKER = "benchmarks/against_worker.py"


class Side:
    """A process that runs rows with one checkout."""

    def __init__(self, checkout: Path, cache: Path) -> None:
        env = os.environ | {
            "PYTHONPATH": f"{checkout}{os.pathsep}{HERE}",
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "SPARSE_COMPILE_CACHE_DIR": str(cache / "kernels"),
        }
        self._run = subprocess.Popen(
            # -P: beside the worker lie modules whose names other packages have.
            [sys.executable, "-P", str(HERE / _WORKER)],
            env=env,
            cwd=checkout,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, **question: Any) -> Any:
        """Send one question and wait for its answer; raises what the worker says went wrong."""
        assert self._run.stdin is not None
        assert self._run.stdout is not None
        self._run.stdin.write(json.dumps(question) + "\n")
        self._run.stdin.flush()
        line = self._run.stdout.readline()
        answer = json.loads(line) if line else {"error": "the worker ended"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def end(self) -> None:
        """Let the process end."""
        assert self._run.stdin is not None
        self._run.stdin.close()
        self._run.wait(timeout=60)


def interval(ratios: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """The middle 95 % of the medians of resampled rounds.

    >>> interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    source = random.Random(0)
    found = sorted(statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(draws))
    return found[int(0.025 * draws)], found[int(0.975 * draws) - 1]


def compared(name: str, before: Side, now: Side, rounds: int) -> list[Row]:
    """The rows of one problem: a forward, and a backward or a step."""
    sides = {"before": before, "now": now}
    kinds = {label: side.ask(prepare=name) for label, side in sides.items()}["now"]
    answers = {label: side.ask(results=name) for label, side in sides.items()}
    differ = max(_difference(a, b) for a, b in zip(answers["before"], answers["now"], strict=True))
    if not differ <= CLOSE:
        raise ArithmeticError(f"results differ by {differ:.2e}")
    times: dict[str, dict[str, list[float]]] = {kind: {"before": [], "now": []} for kind in kinds}
    for turn in range(rounds):
        for label in ("before", "now") if turn % 2 else ("now", "before"):
            for kind, ms in sides[label].ask(time=name).items():
                times[kind][label].append(ms)
    peaks = {label: side.ask(peak=name) for label, side in sides.items()}
    for side in sides.values():
        side.ask(forget=name)
    rows = []
    for kind, found in times.items():
        ratios = [a / b for a, b in zip(found["before"], found["now"], strict=True)]
        rows.append(
            {
                "row": f"{name}, {kind}",
                "before_ms": statistics.median(found["before"]),
                "now_ms": statistics.median(found["now"]),
                "ratio": statistics.median(ratios),
                "interval": interval(ratios),
                "difference": differ,
                "peak_bytes": {label: peak[kind] for label, peak in peaks.items()},
            }
        )
    return rows


def _difference(a: Sequence[float], b: Sequence[float]) -> float:
    most = max((abs(x) for x in a), default=0.0) or 1.0
    return max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0) / most


def warm(names: Sequence[str], make: Callable[[], Side], workers: int) -> None:
    """Compile the kernels of all rows, some at a time, into the caches that sides share."""

    def part(some: Sequence[str]) -> None:
        side = make()
        for name in some:
            try:
                side.ask(prepare=name)
                side.ask(results=name)
                side.ask(forget=name)
            except RuntimeError as error:
                print(f"warming {name}: {error}", flush=True)
                return
        side.end()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(part, [names[i::workers] for i in range(workers)]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", required=True, type=Path, help="checkout from before")
    parser.add_argument("--only", nargs="*", help="names of rows; default all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=6, help="processes that compile first")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/against"))
    parser.add_argument("--out", help="path of the JSON file")
    args = parser.parse_args(argv)
    from benchmarks.environment import write_json

    makers = {
        "before": lambda: Side(args.base.resolve(), args.cache / "before"),
        "now": lambda: Side(HERE, args.cache / "now"),
    }
    sides = {label: make() for label, make in makers.items()}
    names = args.only or sides["now"].ask(names=True)
    for make in makers.values() if len(names) > 1 else ():
        warm(names, make, args.workers)
    rows: list[Row] = []
    for name in names:
        try:
            found = compared(name, sides["before"], sides["now"], args.rounds)
        except (RuntimeError, ArithmeticError) as error:
            found = [{"row": name, "error": str(error)[:600]}]
        rows += found
        for row in found:
            print(_line(row), flush=True)
        if args.out:
            write_json(args.out, rows, summary=summary(rows), rounds=args.rounds)
    print(json.dumps(summary(rows)))


def _line(row: Row) -> str:
    if "error" in row:
        return f"{row['row']}: {row['error']}"
    low, high = row["interval"]
    times = f"{row['before_ms']:.3f} -> {row['now_ms']:.3f} ms"
    return f"{row['row']:44} {times}  {row['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def summary(rows: Sequence[Row]) -> Row:
    """The geometric mean of the ratios, the slowest rows, and how peak memory changed at most."""
    good = [row for row in rows if "ratio" in row]
    if not good:
        return {}
    peaks = [row["peak_bytes"]["now"] / max(row["peak_bytes"]["before"], 1) for row in good]
    return {
        "rows": len(good),
        "failed": len(rows) - len(good),
        "geometric_mean": statistics.geometric_mean(row["ratio"] for row in good),
        "wholly_below_0.97": [row["row"] for row in good if row["interval"][1] < 0.97],
        "largest_peak_ratio": max(peaks),
    }


if __name__ == "__main__":
    main()

"""Random attention programs, compiled and compared with eager.

    python -m benchmarks.fuzz --count 200
    python -m benchmarks.fuzz --count 20000 --part 3/20 --json benchmarks/results/fuzz.json
    python -m benchmarks.fuzz --show 125
    python -m benchmarks.fuzz --shrink 125

Programs are numbered by seeds. With ``--json`` those that are in the file already are not run
again, so a run can be interrupted and continued, in parts if need be. It ends with 1 if a program
is not what eager computes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.fuzz import results
from benchmarks.fuzz.check import Invalid, Result, check
from benchmarks.fuzz.draw import draw
from benchmarks.fuzz.program import Program, source
from benchmarks.fuzz.results import Summary
from benchmarks.fuzz.shrink import shrunk

#: Of so many programs one goes through Inductor, which takes most of the time of a program.
INDUCTOR_ONE_IN = 100
#: So often is the file written.
_WRITTEN = 50


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--count", type=int, default=1000, help="how many programs")
    parser.add_argument("--seed", type=int, default=0, help="of the first one")
    parser.add_argument("--part", metavar="K/N", default="1/1", help="the K-th of N parts")
    parser.add_argument("--json", metavar="FILE", help="the summary, which is added to")
    parser.add_argument("--show", metavar="SEED", type=int, help="print a program")
    parser.add_argument(
        "--shrink", metavar="SEED", type=int, help="print what it needs to be wrong"
    )
    return parser.parse_args(argv)


def part(first: int, count: int, of: str) -> range:
    """The seeds of the K-th of N parts.

    >>> part(0, 10, "2/2")
    range(5, 10)
    """
    number, parts = (int(text) for text in of.split("/"))
    if not 1 <= number <= parts:
        sys.exit(f"--part takes K/N with K from 1 to N, not {of}")
    return range(first + count * (number - 1) // parts, first + count * number // parts)


def run(program: Program, inductor: bool = False) -> Result:
    """What a program shows."""
    return check(source(program), program.grad, program.dynamic, inductor)


def fuzzed(seeds: Iterable[int], known: Summary | None = None) -> Iterator[Summary]:
    """The summary after each program."""
    summary = known or Summary()
    for seed in seeds:
        if summary.has(seed):
            continue
        program, inductor = draw(seed), seed % INDUCTOR_ONE_IN == 0
        try:
            result = run(program, inductor)
        except Invalid as error:  # a mistake of the fuzzer's
            result = Result(error=f"it does not run in eager: {error}")
        summary = summary.plus(seed, result, source(program), inductor)
        yield summary


def minimal(program: Program) -> tuple[Program, Result]:
    """The plainest program that is wrong in the same way, and what it shows."""
    kind = run(program)

    def shows(other: Program) -> bool:
        try:
            result = run(other)
        except (Invalid, KeyError):
            return False
        return bool(result.wrong) and bool(result.error) == bool(kind.error)

    least = shrunk(program, shows)
    return least, run(least)


def line(summary: Summary) -> str:
    """What is printed now and then."""
    return (
        f"{summary.programs} programs, {summary.rewritten} of {summary.sites} attentions rewritten "
        f"({100 * summary.share:.1f} %), {len(summary.mismatches)} mismatches"
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(1)
    if args.show is not None:
        print(source(draw(args.show)))
        return 0
    if args.shrink is not None:
        program, result = minimal(draw(args.shrink))
        print(source(program), f"# {result.wrong or 'nothing is wrong'}", sep="\n\n")
        return 1 if result.wrong else 0
    summary = results.read(args.json) if args.json else Summary()
    seeds = part(args.seed, args.count, args.part)
    for number, after in enumerate(fuzzed(seeds, summary), 1):
        for wrong in after.mismatches[len(summary.mismatches) :]:
            print(f"{wrong.seed}: {wrong.seen}", flush=True)
        summary = after
        if number % _WRITTEN == 0:
            print(line(summary), flush=True)
            _write(args.json, summary)
    _write(args.json, summary)
    print(line(summary))
    for reason, count in summary.left.items():
        print(f"{count:6} left, as seed {summary.examples[reason]}: {reason}")
    return 1 if summary.mismatches else 0


def _write(path: str | None, summary: Summary) -> None:
    if path:
        Path(path).write_text(results.to_json(summary))


if __name__ == "__main__":
    sys.exit(main())

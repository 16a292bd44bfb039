"""The survey of models: what is found and rewritten in each, and how exact it is.

    python -m benchmarks.models --only bert,mistral
    python -m benchmarks.models --part 3/16 --json part.json
    python -m benchmarks.models --read benchmarks/results/models.json --markdown docs/MODELS.md
    python -m benchmarks.models --read models.json --only bert --json models.json

It ends with 1 if something raised an exception or is not as exact as eager.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.models import results, table
from benchmarks.models.check import OPTIONS, Case, Result, check, units
from benchmarks.models.entry import LENGTH, WINDOW, Entry
from benchmarks.models.exactness import BAR
from benchmarks.models.results import Survey
from benchmarks.models.zoo import ENTRIES, version


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--only", metavar="NAMES", help="of models, with commas; default all")
    parser.add_argument("--part", metavar="K/N", help="the K-th of N parts; default all")
    parser.add_argument("--json", metavar="FILE", help="write the results")
    parser.add_argument("--markdown", metavar="FILE", help="write the page")
    parser.add_argument(
        "--read",
        metavar="FILE",
        help="results to begin with: makes only those that are named, or none",
    )
    return parser.parse_args(argv)


def chosen(only: str | None) -> list[Entry]:
    """The models that are named and that can be imported."""
    names = only.split(",") if only else list(ENTRIES)
    unknown = [name for name in names if name not in ENTRIES]
    if unknown:
        sys.exit(f"no model is called {', '.join(unknown)}; there are: {', '.join(ENTRIES)}")
    missing = {e.package for e in ENTRIES.values() if version(e.package) is None}
    left_out = [name for name in names if ENTRIES[name].package in missing]
    if left_out:
        print(f"cannot be imported: {', '.join(sorted(missing))}; without {', '.join(left_out)}")
    return [ENTRIES[name] for name in names if name not in left_out]


def part(every: Sequence[tuple[Entry, str, Case]], of: str) -> Sequence[tuple[Entry, str, Case]]:
    """The K-th of N parts, each with cases of many models."""
    number, count = (int(text) for text in of.split("/"))
    if not 1 <= number <= count:
        sys.exit(f"--part takes K/N with K from 1 to N, not {of}")
    return every[number - 1 :: count]


def line(result: Result, seconds: float) -> str:
    """What is printed of a result."""
    name = f"{result.model:16} {result.implementation:5} {result.case:19}"
    if result.error:
        return f"{name} {result.error}"
    exact = result.exactness
    errors = "" if exact is None else f"{exact.output:.1e} {exact.gradient or 0:.1e}"
    wrong = "" if result.ok or exact is None else f"  NOT EXACT: {exact.worst}"
    found = f"{result.rewritten}/{len(result.sites)}, {result.graphs} graph"
    return f"{name} {found}  {errors:16} {seconds:4.1f} s{wrong}"


def surveyed(every: Sequence[tuple[Entry, str, Case]]) -> Iterator[Result]:
    """Check and print, one after the other."""
    at = results.commit()
    for entry, implementation, case in every:
        began = time.perf_counter()
        result = replace(check(entry, implementation, case), commit=at)
        print(line(result, time.perf_counter() - began), flush=True)
        yield result


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(1)
    survey = results.read(args.read) if args.read else Survey({}, ())
    if args.only or args.part or not args.read:
        every = part(units(chosen(args.only)), args.part or "1/1")
        survey = replace(survey, environment={**survey.environment, **results.versions()})
        for result in surveyed(every):
            survey = with_result(survey, result)
            write(survey, args)
    write(survey, args)
    return 0 if survey.ok else 1


def with_result(survey: Survey, result: Result) -> Survey:
    """With a result in the place of that of the same case, in the order of all models."""
    known = results.of_case((*survey.results, result))
    cases = [(e.name, how, case.name) for e, how, case in units(ENTRIES.values())]
    order = {case: number for number, case in enumerate(cases)}
    ordered = sorted(known, key=lambda case: order.get(case, len(order)))
    return replace(survey, results=tuple(known[case] for case in ordered))


def write(survey: Survey, args: argparse.Namespace) -> None:
    """What there is of the survey, to the files that are asked for."""
    if args.json:
        Path(args.json).write_text(results.to_json(survey))
    if args.markdown:
        Path(args.markdown).write_text(page_of(survey))


def page_of(survey: Survey) -> str:
    """docs/MODELS.md, as of this survey."""
    return table.page(survey, LENGTH, WINDOW, BAR, OPTIONS)


if __name__ == "__main__":
    sys.exit(main())

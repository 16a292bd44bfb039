"""What programs showed, in numbers: a summary that adds up, as a JSON file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.fuzz.check import OPTIONS, Result


@dataclass(frozen=True)
class Wrong:
    """A program that is not what eager computes: its seed, what was seen, and its source."""

    seed: int
    seen: str
    source: str


@dataclass(frozen=True)
class Summary:
    """Of many programs.

    Attributes:
        seeds: of the programs, as ranges: first, and one behind the last.
        sites: how many attentions they have.
        rewritten: how many of these are.
        left: how many are not, by reason.
        examples: the seed of a program for each of these reasons.
        inductor: how many programs went through Inductor.
        mismatches: the programs that are wrong.
    """

    seeds: tuple[tuple[int, int], ...] = ()
    sites: int = 0
    rewritten: int = 0
    left: dict[str, int] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    inductor: int = 0
    mismatches: tuple[Wrong, ...] = ()

    @property
    def programs(self) -> int:
        """How many there are."""
        return sum(end - first for first, end in self.seeds)

    @property
    def share(self) -> float:
        """Of the attentions, how many are rewritten."""
        return self.rewritten / max(self.sites, 1)

    def has(self, seed: int) -> bool:
        """Whether a program is part of it."""
        return any(first <= seed < end for first, end in self.seeds)

    def plus(self, seed: int, result: Result, source: str, inductor: bool) -> Summary:
        """With one more program."""
        left = Counter(self.left) + Counter(reason for reason in result.left if reason)
        wrong = (Wrong(seed, result.wrong, source),) if result.wrong else ()
        return Summary(
            joined([*self.seeds, (seed, seed + 1)]),
            self.sites + len(result.left),
            self.rewritten + sum(not reason for reason in result.left),
            dict(left.most_common()),
            {**dict.fromkeys(filter(None, result.left), seed), **self.examples},
            self.inductor + inductor,
            (*self.mismatches, *wrong),
        )


def joined(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges in order, those that meet as one.

    >>> joined([(4, 5), (0, 2), (2, 3)])
    ((0, 3), (4, 5))
    """
    found: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if found and found[-1][1] == first:
            first = found.pop()[0]
        found.append((first, end))
    return tuple(found)


def total(summaries: Iterable[Summary]) -> Summary:
    """Several summaries of different programs as one."""
    made = Summary()
    for one in summaries:
        made = replace(
            made,
            seeds=joined([*made.seeds, *one.seeds]),
            sites=made.sites + one.sites,
            rewritten=made.rewritten + one.rewritten,
            left=dict((Counter(made.left) + Counter(one.left)).most_common()),
            examples={**one.examples, **made.examples},
            inductor=made.inductor + one.inductor,
            mismatches=(*made.mismatches, *one.mismatches),
        )
    return made


def to_json(summary: Summary) -> str:
    """As a file."""
    versions = {name: environment()[name] for name in ("torch", "python", "commit")}
    numbers = {"programs": summary.programs, "sites": summary.sites, "rewritten": summary.rewritten}
    shown: dict[str, Any] = {"environment": versions, "options": OPTIONS, **numbers}
    shown |= {"share_rewritten": round(summary.share, 4), **asdict(summary)}
    return json.dumps(shown, indent=1) + "\n"


def from_json(text: str) -> Summary:
    """What :func:`to_json` wrote."""
    read = json.loads(text)
    return Summary(
        tuple((first, end) for first, end in read["seeds"]),
        *(read[name] for name in ("sites", "rewritten", "left", "examples", "inductor")),
        tuple(Wrong(**one) for one in read["mismatches"]),
    )


def read(path: str | Path) -> Summary:
    """The summary in a file; of no programs if there is none."""
    return from_json(Path(path).read_text()) if Path(path).exists() else Summary()

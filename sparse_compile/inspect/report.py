"""Report: what was found in a model, what became of it and why, as a value that prints well."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparse_compile.selection import SelectionReport

_WIDTH = 100
_LABEL = 12
_SHOWN = 4


@dataclass(frozen=True)
class SiteReport:
    """One attention of the model.

    Attributes:
        where: the module and the source line, as ``layers.0.attn, model.py:12 in forward``.
        rewritten: whether something else runs in its place.
        reason: why it was rewritten, or why not.
        hint: what to change or to know; may be empty.
        mask: its mask over ``b, h, q, kv``; None if it was not read.
        density: pairs that may attend over all pairs, in this call; None if unknown.
        block_density: blocks that are visited over all blocks, in this call; None if unknown.
        executor: ``"triton"``, ``"cpu"``, ``"selected"`` (attention over the keys that an index
            names), ``"sdpa"`` (PyTorch's dense kernel, without the mask tensor) or ``"unchanged"``.
        kernel: name of the generated kernel; None where none is.
        annotation: what the user's innermost annotation says of it, and on what it is, as
            ``restrict SlidingWindow(512), on class Block``; None without one.
        views: the orders in which the parts of its mask are blockwise dense, in words; empty where
            it is computed in plain order.
        cost: why these, in a sentence; empty where no other order was in question.
        selection: what selects keys in each call, as ``TopK(16)``: an approximation that the user
            asked for; None where nothing is selected.
        score: what happens to the scaled products ``score`` of q and k before the mask, as
            ``50*tanh(score/50)``, and whether there is a sink; None: nothing.
        ways: every way to run it, with what it is predicted to cost, or why it cannot be.
        utilisation: on a GPU, the modelled share of its multiprocessors' time that is busy.
    """

    where: str
    rewritten: bool
    reason: str
    hint: str = ""
    mask: str | None = None
    density: float | None = None
    block_density: float | None = None
    executor: str = "unchanged"
    kernel: str | None = None
    annotation: str | None = None
    views: tuple[str, ...] = ()
    cost: str = ""
    utilisation: float | None = None
    selection: str | None = None
    lists: SelectionReport | None = None
    score: str | None = None
    ways: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What :func:`sparse_compile.explain` found; ``print`` it, or read its fields.

    Attributes:
        sites: every attention, and everything that looked like one, in program order.
        graphs: how many graphs torch.compile captured; more than one means graph breaks.
        skipped: the functions that it gave up on, where there is no graph, and why.

    >>> site = SiteReport("model.py:3 in forward", True, "its mask is narrow", mask="kv <= q")
    >>> Report.from_json(Report((site,), 1).to_json()).sites[0] == site
    True
    """

    sites: tuple[SiteReport, ...]
    graphs: int
    skipped: tuple[str, ...] = ()

    @property
    def rewritten(self) -> int:
        """How many attentions are rewritten."""
        return sum(site.rewritten for site in self.sites)

    def to_json(self) -> str:
        """JSON text, keys in the order of the fields: ``{"graphs": 1, "sites": [{...}], ...}``."""
        sites, skipped = [asdict(site) for site in self.sites], list(self.skipped)
        return json.dumps({"graphs": self.graphs, "sites": sites, "skipped": skipped})

    @staticmethod
    def from_json(text: str) -> Report:
        """The report that :meth:`to_json` wrote."""
        read = json.loads(text)
        return Report(tuple(map(_site_of, read["sites"])), read["graphs"], tuple(read["skipped"]))

    def __str__(self) -> str:
        """The summary, then each attention with what became of it."""
        blocks = [self._summary()]
        blocks += ["\n".join(_site_lines(numbers, sites)) for numbers, sites in self._groups()]
        return "\n\n".join(blocks)

    def _summary(self) -> str:
        found = f"{self.rewritten} of {_count(len(self.sites), 'attention')} rewritten"
        if not self.sites:
            found = "no attention found"
        breaks = max(self.graphs - 1, 0)
        broken = f" ({_count(breaks, 'graph break')})" if breaks else ""
        skipped = "".join(f"\n    torch.compile skipped {frame}" for frame in self.skipped)
        return f"sparse_compile: {found}, in {_count(self.graphs, 'graph')}{broken}{skipped}"

    def _groups(self) -> Iterator[tuple[list[int], list[SiteReport]]]:
        """Sites that differ only in where they stand, such as the layers of a model, together."""
        groups: dict[SiteReport, list[int]] = {}
        for number, site in enumerate(self.sites):
            groups.setdefault(replace(site, where="", lists=None), []).append(number)
        for numbers in groups.values():
            yield numbers, [self.sites[number] for number in numbers]


def _site_of(read: dict[str, Any]) -> SiteReport:
    lists = read["lists"] and SelectionReport(**read["lists"])
    several = {name: tuple(read[name]) for name in ("views", "ways")}
    return SiteReport(**{**read, **several, "lists": lists})


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _site_lines(numbers: list[int], sites: list[SiteReport]) -> Iterator[str]:
    places = [f"[{number}] {s.where}" for number, s in zip(numbers, sites, strict=True)]
    yield from places[:_SHOWN]
    if len(places) > _SHOWN:
        yield f"    and {len(places) - _SHOWN} more like these: {_ranges(numbers[_SHOWN:])}"
    for label, text in _rows(numbers, sites):
        if text:
            yield from _field(label, text)


def _rows(numbers: list[int], sites: list[SiteReport]) -> Iterator[tuple[str, str | None]]:
    """What there is to say of sites that are alike, each with its label."""
    site = sites[0]
    yield "rewritten", f"{'yes' if site.rewritten else 'no'}: {site.reason}"
    yield "hint", site.hint
    yield "annotated", site.annotation
    yield "score", site.score
    yield "mask", site.mask
    yield "selects", site.selection and f"{site.selection}, an approximation"
    yield from _selected(numbers, sites)
    yield "density", _share(site.density, "the pairs may attend")
    yield "blocks", _share(site.block_density, "the blocks are visited")
    yield from zip(("views", *("" for _ in site.views)), site.views, strict=False)
    yield "cost", site.cost
    busy = "the multiprocessors' time is busy, by the model"
    yield "schedule", _share(site.utilisation, busy)
    yield "executor", site.executor
    yield "kernel", site.kernel


def _selected(numbers: list[int], sites: list[SiteReport]) -> Iterator[tuple[str, str]]:
    """How much each of the sites that are shown selects."""
    shown = [(n, str(s.lists)) for n, s in zip(numbers, sites, strict=True) if s.lists][:_SHOWN]
    one = len({text for _, text in shown}) == 1
    for place, (number, text) in enumerate(shown[:1] if one else shown):
        yield "" if place else "selected", text if one else f"[{number}] {text}"


def _share(share: float | None, what: str) -> str | None:
    return None if share is None else f"{_percent(share)} of {what}"


def _field(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        width=_WIDTH,
        initial_indent=f"    {label:<{_LABEL}}",
        subsequent_indent=" " * (4 + _LABEL),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _percent(share: float) -> str:
    """Two significant digits, so that a narrow mask does not print as 0.

    >>> _percent(0.5), _percent(0.00012), _percent(1.0), _percent(0.0)
    ('50 %', '0.012 %', '100 %', '0 %')
    """
    digits = f"{100 * share:.2g}"
    return f"{float(digits):f}".rstrip("0").rstrip(".") + " %"


def _ranges(numbers: list[int]) -> str:
    """Consecutive numbers joined.

    >>> _ranges([4, 5, 6, 9])
    '4-6, 9'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)

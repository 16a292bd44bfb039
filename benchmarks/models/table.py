"""The survey as a page of documentation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from string import ascii_lowercase

from benchmarks.models.check import Result
from benchmarks.models.results import Survey

COMMAND = (
    "python -m benchmarks.models --json benchmarks/results/models.json --markdown docs/MODELS.md"
)
_COLUMNS = (
    *("model", "attention", "cases", "found", "rewritten", "pairs", "left"),
    "errors: outputs, gradients",
)
_INTRO = """\
# Models

What becomes of the attention of unmodified models: those of transformers, and some of timm and
diffusers. It is made by

```sh
{command}
```

in half an hour on a core, from [`models.json`](../benchmarks/results/models.json), which has every
case on a line. The tests run a part of it, another one for each commit, and compare.

Each model has two layers (or stages) and random weights, none of them zero; {length} tokens;
windows and chunks of {window}. It is compiled without padding, padded at the left and at the right,
and with sequences packed one after the other by their position ids; each without gradients (eval)
and with (train). Eager and compiled are compared in fp32 on a CPU: every output, padded rows too,
and the gradient of every parameter under a loss that reads all of these. An error is relative, in
norm. One above {bar:.0e} that is also more than 1.1 times as far from fp64 as eager's would be
**bold**. With dropout nothing is compared.

`options={options}` has everything rewritten that can be: without
it, problems as small as these are left as they are, since they are fastest so. *Found* and
*rewritten* count attentions; *pairs* are those that may attend, of all, in what is rewritten. Why
something is left as it is stands under the table.
"""


def page(survey: Survey, length: int, window: int, bar: float, options: object) -> str:
    """docs/MODELS.md."""
    intro = _INTRO.format(command=COMMAND, length=length, window=window, bar=bar, options=options)
    versions = ", ".join(f"{name} {number}" for name, number in survey.environment.items())
    commits = ", ".join(dict.fromkeys(result.commit for result in survey.results))
    reasons = _reasons(survey.results)
    lines = [
        intro,
        f"{_summary(survey.results)} Made with {versions}, at {commits}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "| --- " * len(_COLUMNS) + "|",
        *(_line(row, reasons) for row in rows(survey.results)),
        "",
        *_listed(reasons),
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Row:
    """Cases of a model and an implementation of which the same is to be told."""

    cases: str
    results: tuple[Result, ...]


def rows(results: Iterable[Result]) -> Iterator[Row]:
    """The rows of the table."""
    for _, group in groupby(results, lambda result: (result.model, result.implementation)):
        every = list(group)
        alike: dict[object, list[Result]] = {}
        for result in every:
            alike.setdefault(_told(result), []).append(result)
        compared = [result.case for result in every if "dropout" not in result.case]
        for same in alike.values():
            yield Row(_cases([result.case for result in same], compared), tuple(same))


def _told(result: Result) -> object:
    what = [(site.rewritten, site.reason if not site.rewritten else "") for site in result.sites]
    return tuple(what), result.graphs, result.error, "dropout" in result.case


def _cases(cases: Sequence[str], every: Sequence[str]) -> str:
    """Cases in few words.

    >>> _cases(["left eval", "left train", "none eval"], ["left eval", "left train", "none eval"])
    'all'
    >>> _cases(["left eval", "left train", "none eval"], [])
    'left, none eval'
    """
    if list(cases) == list(every):
        return "all"
    words: dict[str, list[str]] = {}
    for case in cases:
        padding, _, mode = case.partition(" ")
        words.setdefault(padding, []).append(mode)
    both = ["eval", "train"]
    return ", ".join(p if modes == both else f"{p} {' '.join(modes)}" for p, modes in words.items())


def _line(row: Row, reasons: dict[str, str]) -> str:
    first = row.results[0]
    graphs = "" if first.graphs == 1 or first.error else f" ({first.graphs} graphs)"
    left = dict.fromkeys(reasons[site.reason] for site in first.sites if not site.rewritten)
    cells = [
        *(first.model, first.implementation, row.cases + graphs),
        *(str(len(first.sites)), str(first.rewritten), _pairs(row.results)),
        f"**{first.error.splitlines()[0]}**" if first.error else ", ".join(left),
        _errors(row.results),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _pairs(results: Sequence[Result]) -> str:
    densities = [s.density for r in results for s in r.sites if s.density is not None]
    if not densities:
        return ""
    ends = dict.fromkeys(f"{100 * value:.0f} %" for value in (min(densities), max(densities)))
    return " to ".join(ends)


def _errors(results: Sequence[Result]) -> str:
    found = [result.exactness for result in results if result.exactness is not None]
    if not found:
        return ""
    gradients = [one.gradient for one in found if one.gradient is not None]
    ends = [max(one.output for one in found), *([max(gradients)] if gradients else [])]
    text = ", ".join(f"{value:.1e}" if value else "0" for value in ends)
    return text if all(one.within for one in found) else f"**{text}**"


def _reasons(results: Iterable[Result]) -> dict[str, str]:
    """A name for each reason, in the order of the table."""
    left = [s.reason for row in rows(results) for s in row.results[0].sites if not s.rewritten]
    return {reason: _letters(number) for number, reason in enumerate(dict.fromkeys(left))}


def _letters(number: int) -> str:
    """``a`` to ``z``, then ``aa``.

    >>> _letters(0), _letters(25), _letters(26)
    ('a', 'z', 'aa')
    """
    more, last = divmod(number, len(ascii_lowercase))
    return (_letters(more - 1) if more else "") + ascii_lowercase[last]


def _listed(reasons: dict[str, str]) -> Iterator[str]:
    if reasons:
        yield "Left as they are, because:"
        yield ""
        yield from (f"- **{name}**: {reason}" for reason, name in reasons.items())


def _summary(results: Sequence[Result]) -> str:
    sites = [site for result in results for site in result.sites]
    own = sum("PyTorch's own kernel already" in site.reason for site in sites)
    models, wrong = {result.model for result in results}, sum(not r.ok for r in results)
    many = "cases are" if wrong > 1 else "case is"
    return (
        f"{len(models)} models, {len(results)} cases: {sum(s.rewritten for s in sites)} of "
        f"{len(sites)} attentions are rewritten, {own} of the others run in a kernel of PyTorch's "
        f"that already skips what can be. {wrong or 'No'} {many} "
        "above the bar or raised an exception."
    )

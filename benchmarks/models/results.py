"""Results of the survey as a JSON file, a line for each case."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.models.check import OPTIONS, Result, Site
from benchmarks.models.exactness import Exactness
from benchmarks.models.zoo import version


@dataclass(frozen=True)
class Survey:
    """What a run showed, and with which versions of what."""

    environment: dict[str, str]
    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """Whether every result is."""
        return all(result.ok for result in self.results)


def commit() -> str:
    """That results are made at."""
    return environment()["commit"][:10]


def versions() -> dict[str, str]:
    """Of the packages that results depend on."""
    found = {name: version(name) for name in ("transformers", "timm", "diffusers")}
    installed = {name: number for name, number in found.items() if number is not None}
    return {"torch": environment()["torch"], **installed}


def to_json(survey: Survey) -> str:
    """As a file: reasons once, and named by their numbers."""
    left = [s.reason for r in survey.results for s in r.sites if not s.rewritten]
    reasons = list(dict.fromkeys(left))
    rows = [json.dumps(_row(result, reasons)) for result in survey.results]
    head = {"environment": survey.environment, "options": OPTIONS, "reasons": reasons}
    start = json.dumps(head, indent=1).removesuffix("\n}")
    return f'{start},\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"


def from_json(text: str) -> Survey:
    """What :func:`to_json` wrote."""
    read = json.loads(text)
    results = tuple(_result(row, read["reasons"]) for row in read["rows"])
    return Survey(read["environment"], results)


def read(path: str | Path) -> Survey:
    """The survey in a file."""
    return from_json(Path(path).read_text())


def _row(result: Result, reasons: list[str]) -> dict[str, Any]:
    row = asdict(result)
    row["sites"] = [_site(site, reasons) for site in result.sites]
    if result.exactness is not None:
        errors = asdict(result.exactness)
        row["exactness"] = {name: _rounded(value) for name, value in errors.items()}
    return {name: value for name, value in row.items() if value not in ("", None)}


def _site(site: Site, reasons: list[str]) -> dict[str, Any]:
    if not site.rewritten:
        return {"left": reasons.index(site.reason)}
    return {} if site.density is None else {"density": _rounded(site.density)}


def _rounded(value: Any) -> Any:
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    return float(f"{value:.3g}")


def _result(row: dict[str, Any], reasons: list[str]) -> Result:
    sites = tuple(
        Site("", "left" not in s, reasons[s["left"]] if "left" in s else "", s.get("density"))
        for s in row["sites"]
    )
    errors = row.get("exactness")
    exactness = None if errors is None else Exactness(**errors)
    return Result(**{**row, "sites": sites, "exactness": exactness})


def of_case(results: Iterable[Result]) -> dict[tuple[str, str, str], Result]:
    """Results by model, implementation and case."""
    return {(r.model, r.implementation, r.case): r for r in results}

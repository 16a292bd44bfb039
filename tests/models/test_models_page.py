"""The survey of models itself: its page, its file, its parts, and that it sees what is wrong."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # where a plain `pytest` does not look

from benchmarks.models import __main__ as command
from benchmarks.models import check as checking
from benchmarks.models.check import Case, Result, Site, check, units
from benchmarks.models.entry import Entry
from benchmarks.models.exactness import exactness, is_as_exact, is_nothing, relative_error, values
from benchmarks.models.results import Survey, from_json, of_case, read, to_json
from benchmarks.models.zoo import ENTRIES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "models.json"


def test_the_page_is_made_of_the_results() -> None:
    assert (ROOT / "docs" / "MODELS.md").read_text() == command.page_of(read(RESULTS))


def test_the_results_are_of_known_cases_and_all_are_exact() -> None:
    survey = read(RESULTS)
    every = [(e.name, how, case.name) for e, how, case in units(ENTRIES.values())]
    assert set(of_case(survey.results)) <= set(every)
    assert [(r.model, r.implementation, r.case) for r in survey.results if not r.ok] == []


def test_parts_are_disjoint_and_all_of_it() -> None:
    every = units(ENTRIES.values())
    parts = [command.part(every, f"{k}/12") for k in range(1, 13)]
    assert sum(map(len, parts)) == len(every)
    assert {id(unit) for one in parts for unit in one} == {id(unit) for unit in every}
    with pytest.raises(SystemExit):
        command.part(every, "13/12")


def test_results_are_read_as_they_were_written() -> None:
    sites = (Site("", True, "", 0.25), Site("", False, "it is dense"))
    results = (
        Result("a", "eager", "none eval", 1, sites, seconds=0.5),
        Result("a", "eager", "none train", error="KeyError at a.py:1 in f: 'b'"),
    )
    survey = Survey({"torch": "2"}, results)
    assert from_json(to_json(survey)) == survey
    page = command.page_of(survey)
    assert "| a | eager | none eval | 2 | 1 | 25 % | a |  |" in page
    assert "**KeyError at a.py:1 in f: 'b'**" in page
    assert "1 case is above the bar or raised an exception" in page


def test_a_result_takes_the_place_of_that_of_its_case() -> None:
    one, other = Result("a", "eager", "none eval"), Result("a", "eager", "none train")
    survey = command.with_result(Survey({}, (one, other)), replace(one, graphs=2))
    assert survey.results == (replace(one, graphs=2), other)
    assert command.with_result(Survey({}, (one,)), other).results == (one, other)


class Window(nn.Module):
    """A causal window of 8, as a model."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        i = torch.arange(x.shape[-2])
        mask = (i[None] <= i[:, None]) & (i[:, None] - i[None] < 8)
        return ((q @ k.mT) / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def window(implementation: str, dropout: bool) -> nn.Module:
    torch.manual_seed(0)
    return Window()


def given(padding: str) -> dict[str, Tensor]:
    return {"x": torch.randn(2, 2, 40, 16, generator=torch.Generator().manual_seed(0))}


ENTRY = Entry("window", window, given, ("none",), ("eager",))
TRAIN = Case("none", True)


@pytest.mark.parametrize("case", [Case("none", False), TRAIN], ids=lambda case: case.name)
def test_a_model_is_checked(case: Case) -> None:
    result = check(ENTRY, "eager", case)
    assert result.ok, result
    assert (result.graphs, result.rewritten, len(result.sites)) == (1, 1, 1)
    assert result.exactness is not None
    assert (result.exactness.gradient is not None) == case.training


def test_what_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(seen: object, training: bool) -> object:
        return lambda gm, inputs: lambda *args: [x / 2 for x in gm(*args)]

    monkeypatch.setattr(checking, "_rewriting", halved)
    result = check(ENTRY, "eager", TRAIN)
    assert result.exactness is not None
    assert not result.ok
    assert result.exactness.output == pytest.approx(0.5)


def test_what_is_raised_is_a_result() -> None:
    def fails(implementation: str, dropout: bool) -> nn.Module:
        raise ValueError("no such thing")

    result = check(replace(ENTRY, build=fails), "eager", TRAIN)
    assert not result.ok
    assert result.error.startswith("ValueError at test_models_page.py:")


def test_a_gradient_that_is_wrong_is_seen() -> None:
    model, inputs = window("eager", False), given("none")
    right = values(model, model, inputs, True)
    assert exactness(right, model, inputs, True).within
    wrong = exactness({**right, "qkv.weight": right["qkv.weight"] * 1.001}, model, inputs, True)
    assert (wrong.within, wrong.worst) == (False, "qkv.weight")


def test_only_what_is_zero_in_fp64_and_small_is_nothing() -> None:
    zero, small, large = torch.zeros(2), torch.full((2,), 1e-6), torch.ones(2)
    assert is_nothing(small, zero, 1.0)
    assert not is_nothing(large, zero, 1.0)
    assert not is_nothing(small, small, 1.0)


def test_no_value_is_as_exact_as_one_that_is_not_finite() -> None:
    nan = torch.tensor([1.0, torch.nan])
    assert relative_error(nan, nan) == 0.0
    assert relative_error(torch.ones(2), nan) == torch.inf
    assert not is_as_exact(torch.ones(2), nan, torch.ones(2) * 2)
    assert not is_as_exact(torch.ones(2), torch.ones(2), nan)


def test_nothing_is_as_exact_as_eager_where_eager_computes_something_else() -> None:
    assert is_as_exact(torch.tensor([1.000105]), torch.tensor([1.0001]), torch.ones(1))
    assert not is_as_exact(torch.tensor([1.105]), torch.tensor([1.1]), torch.ones(1))

"""The benchmarks of whole models, on tiny ones: what is compared, and what becomes of failures."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # where a plain `pytest` does not look

from benchmarks import end_to_end, fp32_attention, sparsified, whole_models
from benchmarks.together import compared_together
from benchmarks.verdicts import verdict
from benchmarks.whole_models import Peer, Problem, Setting, Way, compared

SETTING = Setting("cpu", calls=1)
fp32_attention.register()


class Scaled(nn.Module):
    """A model of one number."""

    def __init__(self, factor: float = 1.5) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor, fails: bool = False) -> tuple[torch.Tensor]:
        if fails or (getattr(self, "untrained", False) and torch.is_grad_enabled()):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return (x * self.factor,)


def problem(*peers: Peer) -> Problem:
    return Problem("scaled", Scaled, peers, {"x": torch.linspace(0, 1, 12).view(2, 6)})


def test_results_are_compared_before_they_are_timed() -> None:
    asked = problem(
        Peer("right", Scaled), Peer("wrong", lambda: Scaled(1.75), ours=True), Peer("no", _broken)
    )
    rows = compared(asked, SETTING)
    assert [row["peer"] for row in rows] == ["right", "wrong", "no"]
    assert rows[0]["forward_error"] < 0.01 > rows[0]["gradient_error"]
    assert rows[1]["forward_error"] == pytest.approx(0.25 / 1.5, rel=0.05)
    assert rows[0]["forward_ms"] > 0 < rows[0]["step_ms"]
    assert "ValueError: broken" in rows[2]["no_forward"]
    judged = verdict(asked, rows)["wrong"]
    assert judged["exact"] is False
    assert judged["met"] is False
    assert judged["forward_over_best"] > 0


def _broken() -> nn.Module:
    raise ValueError("broken")


def _untrained() -> nn.Module:
    made = Scaled()
    made.untrained = True
    return made


def test_out_of_memory_is_a_result() -> None:
    asked = problem(Peer("first", _untrained), Peer("ours", Scaled, ours=True))
    rows = compared(asked, SETTING)
    assert rows[0]["no_step"] == "out of memory"
    assert "forward_ms" in rows[0]
    judged = verdict(asked, rows)["ours"]
    assert "forward_over_first" in judged
    assert "step_over_first" not in judged


def test_ways_are_tried_until_one_trains() -> None:
    ways = Way({"fails": True}), Way(quiet=True), Way()
    (row,) = compared(problem(Peer("some", Scaled, ways=ways)), SETTING)
    assert row["way"] == 1
    assert "step_ms" in row


def test_what_no_attention_could_save_is_no_rival() -> None:
    class Late(Scaled):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            time.sleep(0.1)
            return super().forward(x)

    peers = Peer("first", Late), Peer("ours", Scaled, ours=True), Peer("rest", Scaled, limit=True)
    asked = replace(problem(*peers), trained=False)
    judged = verdict(asked, compared(asked, SETTING))
    assert judged["limits"]["forward_over_first"] > 10
    assert judged["ours"]["forward_over_best"] > 10
    assert set(judged) == {"model", "bars", "limits", "ours"}


def test_another_peer_stands_in_for_one_that_failed() -> None:
    stand_in = Peer("stand-in", Scaled, after="first")
    rows = compared(problem(Peer("first", Scaled), stand_in), SETTING)
    assert [row["peer"] for row in rows] == ["first"]
    rows = compared(problem(Peer("first", _broken), stand_in), SETTING)
    assert [row["peer"] for row in rows] == ["first", "stand-in"]


class Slow(Scaled):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        time.sleep(5)
        return super().forward(x)


def test_time_is_limited() -> None:
    began = time.monotonic()
    rows = compared(problem(Peer("slow", Slow), Peer("late", Scaled)), Setting("cpu", seconds=0.5))
    assert [row["no_forward"] for row in rows] == ["out of time"] * 2
    assert time.monotonic() - began < 4


def test_peers_are_prepared_together() -> None:
    """In processes: each row is there, a stand-in only where it is wanted, the dead are told of."""
    makers = {"well": _well, "dead": _dead}
    found = {asked.name: rows for asked, rows in compared_together(makers, SETTING, 3)}
    assert [row["peer"] for row in found["well"]] == ["right", "wrong"]
    assert found["well"][1]["way"] == 1
    assert found["well"][0]["forward_error"] < 0.01 < found["well"][1]["forward_error"]
    assert found["well"][0]["step_ms"] > 0
    assert [row["peer"] for row in found["dead"]] == ["dies", "stand-in"]
    assert found["dead"][0]["no_forward"] == "its process died"
    assert found["dead"][1]["forward_ms"] > 0


def _well() -> Problem:
    peers = Peer("right", Scaled), Peer("stand-in", Scaled, after="right")
    ways = Way({"fails": True}), Way()
    return replace(problem(*peers, Peer("wrong", partial(Scaled, 1.75), ways=ways)), name="well")


def _dead() -> Problem:
    peers = Peer("dies", partial(os._exit, 1)), Peer("stand-in", Scaled, after="dies")
    return replace(problem(*peers), name="dead")


@pytest.mark.parametrize("name", end_to_end.MODELS)
def test_truth_is_what_transformers_computes(name: str) -> None:
    """In fp32 both are the same, so what is compared with it is compared with the model."""
    model = end_to_end.MODELS[name]
    inputs = {k: x.float() if x.is_floating_point() else x for k, x in _inputs(model).items()}
    found = [
        model.build(implementation, "cpu", True).eval()(**inputs)[0]
        for implementation in (fp32_attention.NAME, "eager")
    ]
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)


def _inputs(model: end_to_end.Model) -> dict[str, Any]:
    return model.inputs("cpu", True)


def test_truth_of_a_batch_in_parts() -> None:
    """Sixteen entries, two at a time: outputs side by side, and the gradients of their sum."""
    asked = Problem("scaled", Scaled, (), {"x": torch.rand(16, 3)})
    found = whole_models.truth_of(asked, Setting("cpu", torch.float32))
    module = Scaled()
    out = module(**asked.inputs)[0]
    whole_models.loss_of(out, torch.float32).backward()
    torch.testing.assert_close(found.out, out)
    torch.testing.assert_close(found.gradients["factor"], module.factor.grad)


def test_truth_in_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = end_to_end.MODELS["gpt_oss"]
    whole = model.build(fp32_attention.NAME, "cpu", True).eval()(**_inputs(model))[0]
    monkeypatch.setattr(fp32_attention, "_MOST", 10000)
    parts = model.build(fp32_attention.NAME, "cpu", True).eval()(**_inputs(model))[0]
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["t5"])
def test_end_to_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_models, "INDUCTOR", "aot_eager")
    out = tmp_path / "end_to_end.json"
    words = ["--tiny", "--device", "cpu", "--calls", "1", "--json", str(out), "--forced"]
    before = [{"model": name, "peer": "old"}, {"model": "another", "peer": "old"}]
    out.write_text(json.dumps({"rows": before, "verdicts": []}))
    end_to_end.main([*words, "--only", name])
    written = json.loads(out.read_text())
    assert written["rows"].pop(0) == before[1]
    rows = {row["peer"]: row for row in written["rows"]}
    assert len(written["rows"]) == len(rows) == 3
    assert [row["model"] for row in written["verdicts"]] == [name]
    for peer in (f"inductor+{end_to_end.MODELS[name].dense}", "sparse_compile"):
        assert rows[peer]["forward_error"] < 0.05
        assert rows[peer]["gradient_error"] < 0.1
        assert rows[peer]["step_ms"] > 0
    assert written["verdicts"][0]["sparse_compile"]["exact"] is not None


@pytest.mark.parametrize("name", [f"{model}_4096" for model in sparsified.MODELS])
def test_sparsified(name: str) -> None:
    """Each as it stands: that the same is so where it is compiled, test_sparsify tests."""
    asked = sparsified.problem_of(name, "cpu", True)
    peers = tuple(replace(peer, backend="") for peer in asked.peers)
    rows = {row["peer"]: row for row in compared(replace(asked, peers=peers), SETTING)}
    limit = rows.pop("without attention, inductor")
    assert limit["step_ms"] > 0
    assert "forward_error" not in limit
    assert list(rows) == ["hf, inductor", "sparsified, sparse_compile", "sparsified, inductor"]
    for row in rows.values():
        assert row["forward_error"] < 0.05
        assert row["gradient_error"] < 0.1
        assert (row["n"], row["batch"]) == (96, 2)


@pytest.mark.parametrize("name", sparsified.CASES)
def test_cases_are_sparse_by_hand(name: str) -> None:
    kind, n = sparsified.CASES[name]
    made = sparsified.MODELS[kind].build(n, "sparsified", "meta", False)
    layers = [m for m in made.modules() if m.extra_repr() == "by sparse_compile"]
    assert len(layers) == sparsified.LAYERS

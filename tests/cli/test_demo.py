"""The demo, small: it finds, checks and times what it says, and says so when a figure is bad."""

from __future__ import annotations

import ast
import functools
import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_compile.cli import demo, demo_model, main
from sparse_compile.cli.demo import DemoResult

GOOD = DemoResult("cpu", 8192, 2, 2, 1e-7, 1e-6, 1e-6, 0.5, 6.0, ())


def test_demo(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_COMPILE_CACHE_DIR", str(tmp_path))
    small = replace(demo._CPU, layers=1, hidden=64, heads=4, head_dim=16)
    monkeypatch.setattr(demo, "_CPU", small)
    # What is compared with is PyTorch's own: here it takes less time to compile.
    without = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", without)
    assert main(["demo", "--n", "512", "--steps", "1", "--device", "cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["correct"]
    assert (result["rewritten"], result["sites"], result["n"]) == (1, 1, 512)
    assert max(result["output_error"], result["gradient_error"]) <= 1e-5
    assert result["speed_up"] == pytest.approx(result["inductor_seconds"] / result["step_seconds"])
    assert all(Path(path).is_file() for path in result["kernels"])
    assert result["kernels"]
    assert "1 of 1 attention rewritten" in err
    assert "▒" in err
    assert "Step 1 of 1: sparse_compile" in err


def test_the_model_knows_nothing_of_the_library() -> None:
    tree = ast.parse(inspect.getsource(demo_model))
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported <= {"__future__", "dataclasses", "torch", "torch.nn.functional"}


def test_summary_names_the_speed_up() -> None:
    assert "12.00x over Inductor, with the same results" in GOOD.summary()
    assert GOOD.correct


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (replace(GOOD, gradient_error=1e-3), "WRONG"),
        (replace(GOOD, output_error=float("nan")), "WRONG"),
        (replace(GOOD, rewritten=1), "WRONG"),
        (replace(GOOD, rewritten=0, sites=0), "WRONG"),
        (replace(GOOD, step_seconds=12.0), "SLOWER"),
        (replace(GOOD, step_seconds=6.1), "no gain"),
    ],
)
def test_summary_is_honest(result: DemoResult, verdict: str) -> None:
    assert verdict in result.summary()
    assert result.correct == (verdict != "WRONG")

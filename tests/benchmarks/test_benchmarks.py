"""The benchmarks on a machine without a GPU: their masks, their sums and their arguments."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # where a plain `pytest` does not look

from benchmarks import accuracy, compiled, layouts, ours, patterns, utilisation
from benchmarks.cases import CASES, Case
from benchmarks.compiled_cases import CHOSEN, EVERY, NO_MASKS, WRITTEN, Size
from benchmarks.compiled_cases import Case as Trained
from benchmarks.instrument import clocked, clocked_kernel
from sparse_compile import patterns as P
from sparse_compile.codegen.triton import aot
from sparse_compile.codegen.triton.blocks.source import kernel_of
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.spec import AttentionSpec, KernelSpec

#: A multiple of 128 and of no higher power of two than 256, with a grid of 72 x 32.
LENGTH = 2304


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_pattern_is_what_the_peers_are_given(case: Case) -> None:
    mask_mod = case.mask_mod(LENGTH, "cpu")
    position = torch.arange(LENGTH)
    expected = mask_mod(0, 0, position[:, None], position[None])
    pattern = case.pattern(LENGTH, "cpu")
    assert torch.equal(accuracy.mask_rows(pattern, position, LENGTH), expected)
    if case.pairs is not None:
        assert case.pairs(LENGTH) == expected.sum()


@pytest.mark.parametrize("name", ["causal", "window", "longformer", "prefix"])
def test_pattern_is_dense_on_short_sequences(name: str) -> None:
    position = torch.arange(256)
    expected = CASES[name].mask_mod(256, "cpu")(0, 0, position[:, None], position[None])
    assert torch.equal(CASES[name].pattern(256, "cpu").dense(256, 256)[0, 0], expected)


def test_sampled_queries_cover_the_special_ones() -> None:
    rows = accuracy.checked_rows(65536)
    assert rows.numel() == rows.unique().numel() == 512
    assert set(range(64)) < set(rows.tolist())
    assert rows[-1] == 65535
    assert torch.equal(accuracy.checked_rows(100), torch.arange(100))


def eager(p: accuracy.Problem, noise: float = 0.0) -> accuracy.Run:
    keep = p.case.mask_mod(p.n, "cpu")(0, 0, torch.arange(p.n)[:, None], torch.arange(p.n))

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, float("-inf"))
        return scores.softmax(-1) @ v * (1 + noise)

    return ours.by_autograd(call, p.inputs, backward=True)


def test_accuracy_passes_eager_and_stops_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "checked_rows", lambda n: torch.arange(0, n, 5))
    p = accuracy.problem(CASES["window"], 384, heads=5, dim=16, device="cpu")
    assert p.heads == [3, 4]
    errors = accuracy.errors_of(p, eager(p))
    assert list(errors) == ["out", "dq", "dk", "dv"]
    with pytest.raises(ArithmeticError, match="out has an error"):
        accuracy.errors_of(p, eager(p, noise=0.02))


def test_arguments() -> None:
    args = patterns.arguments(["--n", "65536", "--no-backward", "--only", "causal", "axial"])
    assert (args.n, args.backward, args.only) == ([65536], False, ["causal", "axial"])
    assert patterns.arguments([]).peers == ["flex"]
    assert patterns.arguments(["--peers", "flex-autotuned", "fa4", "--cold"]).cold
    assert utilisation.arguments([]).only == list(utilisation.MASKS)
    assert len(layouts.jobs(layouts.arguments(["--devices", "cuda", "cpu"]))) == 14
    with pytest.raises(SystemExit):
        patterns.arguments(["--only", "nothing"])


def test_line_shows_times_and_reasons() -> None:
    rows: list[dict[str, Any]] = [
        {"mask": "causal", "n": 64, "implementation": "kernels", "forward_ms": [1.0, 2.0, 3.0]},
        {"mask": "causal", "n": 64, "implementation": "fa4", "skipped": "not installed"},
    ]
    text = patterns.line(rows)
    assert text == "causal       n=64 | kernels 2.000 | fa4 skipped: not installed"


def test_layouts_are_timed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, out = torch.get_num_threads(), tmp_path / "layouts.json"
    words = ["--n", "4096", "--dense-n", "512", "--seconds", "0.1", "--out", str(out)]
    try:
        layouts.main([*words, "--ratios", "--ratio-n", "2304"])
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(out.read_text())["rows"]
    assert not [row for row in rows if "error" in row]
    assert len(rows) == len(CASES) + len(layouts.PATTERNS) + 1
    assert all(row["ratio"] >= 1 for row in rows if "ratio" in row)
    assert all(row["ms"] > 0 and row["nbytes"] > 0 for row in rows if "layout_of" in row)


def test_usage_of_a_launch() -> None:
    clocks = torch.tensor([[100, 140, 3], [120, 160, 3], [180, 190, 3], [110, 200, 7]])
    found = utilisation.summary([clocks, clocks + torch.tensor([1000, 1000, 0])], processors=4)
    assert found["utilisation"] == pytest.approx((70 + 90) / 400)
    assert found["occupancy"] == pytest.approx((90 + 90) / 800)
    assert found["utilisation_with_gaps"] == pytest.approx(320 / 4 / 1100)
    assert (found["programs"], found["processors_used"]) == (8, 2)


def test_clocks_compile_and_frame_the_kernel() -> None:
    mask = MaskExpr((KV <= Q) & (Q - KV < 333))
    spec = KernelSpec(AttentionSpec(mask, block_q=64, block_kv=64), 64, 64, "bfloat16", "sm_90")
    kernel, entry = clocked_kernel(kernel_of(spec))
    function = kernel.function(entry)
    assert function.arg_names[:2] == ["CLOCKS", "Q"]
    if not hasattr(function, "cache_key"):
        pytest.skip("kernels are interpreted here")
    ptx = aot.compiled(kernel, 90).resources["forward"].ptx
    assert ptx.count("%globaltimer") == 2
    assert ptx.index("%globaltimer") < ptx.index("ld.global")
    assert ptx.rindex("%globaltimer") > ptx.rindex("wgmma")
    assert "%smid" in ptx


def test_clocks_of_every_pattern() -> None:
    for case in CASES.values():
        attention = ours.spec_of(case.pattern(LENGTH, "cpu"), LENGTH, "cuda")
        text = clocked(kernel_of(KernelSpec(attention, 128, 128, "bfloat16", "sm_90")).source)
        compile(text, case.name, "exec")
        assert text.count("CLOCK_START") == 2


SMALL = Size(1024, 4, 16, "cpu")


def test_every_exported_pattern_is_trained_through_compile() -> None:
    shown = {name for case in EVERY.values() for name in case.exports}
    assert shown | NO_MASKS == set(P.__all__)
    assert not shown & NO_MASKS


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: case.name)
def test_what_is_written_out_is_the_pattern(case: Trained) -> None:
    q = torch.randn(1, SMALL.heads, SMALL.n, SMALL.dim)
    written = compiled.mask_of(case, SMALL, q, q)
    named = case.pattern(SMALL).dense(SMALL.n, SMALL.n, 1, SMALL.heads)
    assert torch.equal(written, named.expand(written.shape))


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_what_content_selects_is_part_of_what_is_visible(case: Trained) -> None:
    q, k = torch.randn(2, 1, SMALL.heads, SMALL.n, SMALL.dim)
    mask = compiled.mask_of(case, SMALL, q, k)
    assert mask.shape == (1, SMALL.heads, SMALL.n, SMALL.n)
    assert mask.any(-1).all()
    assert 0 < mask.float().mean() < 0.5
    assert not mask.triu(1).any()


@pytest.mark.slow
def test_patterns_are_trained_through_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is compared with is PyTorch's own: here it takes less time to compile.
    without = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", without)
    out = tmp_path / "compiled.json"
    words = ["--device", "cpu", "--n", "256", "--heads", "2", "--dim", "16", "--repeats", "1"]
    compiled.main([*words, "--only", "strided", "top-k", "--out", str(out)])
    written = json.loads(out.read_text())
    assert {"commit", "torch", "triton", "gpu", "cpu"} <= set(written["environment"])
    models = [(row["pattern"], row.get("model")) for row in written["rows"]]
    assert models == [
        *(("strided", model) for model in ("written", "named", "inductor")),
        *(("top-k", model) for model in ("named", "inductor")),
    ]
    for row in written["rows"]:
        assert all(error <= 1e-5 for error in row["errors"].values())
        assert row["forward_ms"] > 0
        assert row["step_ms"] > 0


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that attend to one key too many have a row that says so."""

    def wrong(case: Trained, size: Size, mask: torch.Tensor) -> dict[str, Any]:
        attends = compiled.written_mask(case.mask_mod(size), torch.empty(1, 2, size.n, 1))
        attends[5, 9] = True
        return {"named": compiled.Given(attends), "inductor": compiled.Given(mask)}

    monkeypatch.setattr(compiled, "models", wrong)
    words = ["--device", "cpu", "--n", "128", "--heads", "2", "--dim", "8", "--repeats", "1"]
    (row,) = compiled.main([*words, "--only", "causal"])
    assert "named: out is off by" in row["error"]

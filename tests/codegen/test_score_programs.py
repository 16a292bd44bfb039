"""Score programs: their text, their derivative, and attention with them on every executor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_compile.codegen.cpu import selected as cpu_selected
from sparse_compile.codegen.cpu import views
from sparse_compile.codegen.triton.aot import compiled
from sparse_compile.codegen.triton.blocks.source import kernel_of
from sparse_compile.expr import (
    KV,
    N_Q,
    SCORE,
    H,
    MaskExpr,
    Q,
    ScoreProgram,
    evaluate_score,
    evaluate_slope,
    learned,
    softcap,
    table,
)
from sparse_compile.spec import AttentionSpec, KernelSpec
from tests.codegen.kernel_cases import CAUSAL, Case, check
from tests.codegen.score_cases import CASES
from tests.selection.cases import Case as SelectedCase
from tests.selection.cases import check_executor

CPU = torch.device("cpu")

PROGRAMS = [
    softcap(50.0),
    softcap(30.0),
    softcap(0.3),
    ScoreProgram(SCORE),
    ScoreProgram(sympy.tanh(SCORE)),
    ScoreProgram(2 * softcap(5.0).value - 1),
    ScoreProgram(sympy.log(1 + sympy.exp(-sympy.Abs(SCORE)))),
    ScoreProgram(SCORE / (1 + sympy.exp(-SCORE))),
    ScoreProgram(sympy.Max(sympy.Min(SCORE, 6.5), -3)),
    ScoreProgram(sympy.sqrt(1 + SCORE**2) - SCORE**3 / 1000),
    ScoreProgram(sympy.Piecewise((SCORE, SCORE < 0.25), (0.5 * SCORE + 0.125, True))),
]

SELECTED = [
    SelectedCase("softcap", batch=1, n_q=40, n_kv=40, score=softcap(1.5)),
    SelectedCase(
        "position", batch=1, n_q=40, n_kv=40, q_heads=12, kv_heads=4, score=CASES[-2].score
    ),
    SelectedCase("tokens", batch=1, n_q=40, n_kv=40, unit_kv=1, most=20, score=softcap(1.5)),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_the_derivative_is_that_of_autograd(program: ScoreProgram) -> None:
    scores = torch.linspace(-20, 20, 1001, dtype=torch.float64).requires_grad_()
    value, slope = evaluate_slope(program, scores)
    (expected,) = torch.autograd.grad(value.sum(), scores)
    torch.testing.assert_close(slope.detach(), expected, rtol=1e-12, atol=1e-12)
    inside = torch.linspace(-2.9, 2.9, 12, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: evaluate_score(program, x), inside)


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_text_is_read_back(program: ScoreProgram) -> None:
    assert ScoreProgram.parse(program.text) == program
    for spec in (
        AttentionSpec(CAUSAL, score=program),
        replace(AttentionSpec.of_units(CAUSAL), score=program),
        replace(AttentionSpec.of_listed_blocks(CAUSAL, 64, 64), score=program),
        AttentionSpec(CAUSAL, score=program).with_units(MaskExpr(KV > Q), 1, 16),
    ):
        assert AttentionSpec.parse(spec.text) == spec
        assert [piece.score for piece, _ in spec.pieces] == [program] * len(spec.coverage or (1,))
        assert "score" not in replace(spec, score=None).text


def test_the_parts_of_an_attention_keep_the_tables_of_its_scores() -> None:
    """Blocks that read t0 and units that read t2, with scores that read t1."""
    mask = MaskExpr((KV <= Q) & (table(0)(KV) > 0), ("int64", "float32"))
    spec = AttentionSpec(mask, score=ScoreProgram(SCORE + table(1)(KV)))
    spec = spec.with_units(MaskExpr((KV > Q) & (table(0)(KV) > 0), ("int32",)), 1, 16)
    (blocks, of_blocks), (units, of_units) = spec.pieces
    assert (of_blocks, of_units) == ((0, 1), (1, 2))
    assert [str(piece.score) for piece in (blocks, units)] == ["score + t1(kv)", "score + t0(kv)"]
    assert spec.blocks.mask.tables == mask.tables


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-3, 1e6), st.floats(-1e4, 1e4))
def test_any_softcap(cap: float, score: float) -> None:
    program = softcap(cap)
    assert ScoreProgram.parse(program.text) == program
    at = torch.tensor(score, dtype=torch.float64)
    value, slope = evaluate_slope(program, at)
    torch.testing.assert_close(value, cap * torch.tanh(at / cap), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, 1 - torch.tanh(at / cap) ** 2, rtol=1e-9, atol=1e-12)


def test_sums_are_not_put_in_another_order() -> None:
    """``(1e8 + score) - 1e8`` cancels; as ``score`` it would be another program."""
    program = ScoreProgram(sympy.Max(SCORE + 1e8, 0) - 1e8)
    assert evaluate_score(program, torch.tensor([0.3])).tolist() == [0.0]


def test_what_is_no_program() -> None:
    with pytest.raises(ValueError, match="unknown symbols \\['x'\\]"):
        ScoreProgram(SCORE * sympy.Symbol("x"))
    with pytest.raises(ValueError, match="indexed by the score"):
        ScoreProgram(table(0)(SCORE + KV))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu(case: Case) -> None:
    check(case, CPU, views)


HALF = ("dropout", "softcap", "saturated", "nearly linear", "window")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in HALF], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cpu_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype), CPU, views)


@pytest.mark.parametrize("case", SELECTED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_selected(case: SelectedCase, dtype: torch.dtype) -> None:
    check_executor(cpu_selected, case, CPU, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_kernels_compile_ahead_of_time(arch: str) -> None:
    attention = AttentionSpec(CAUSAL, score=softcap(50.0))
    spec = KernelSpec(attention, 32, 32, "bfloat16", arch)
    loops = ("forward", "backward_query", "backward_key_value")  # the others know no scores
    kernel = kernel_of(spec)
    entries = tuple(entry for entry in kernel.entries if entry.label in loops)
    used = compiled(replace(kernel, entries=entries), arch, GROUP=2).resources
    assert set(used) == set(loops)
    assert used["forward"].spills == used["backward_query"].spills == 0
    assert all("tanh.approx" in one.ptx for one in used.values())
    assert "score    50*tanh(score/50)" in kernel.source


@pytest.mark.parametrize("dtype, arch", [("float16", "sm_90"), ("bfloat16", "interpreter")])
def test_tanh_has_the_bits_of_operands(dtype: str, arch: str) -> None:
    attention = AttentionSpec(CAUSAL, score=softcap(50.0))
    assert "tanh.approx" not in kernel_of(KernelSpec(attention, 32, 32, dtype, arch)).source


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_biases_of_distances_compile_ahead_of_time(arch: str) -> None:
    score = ScoreProgram(SCORE + learned(0)(H, KV - Q + N_Q - 1), ("bfloat16",))
    kernel = kernel_of(KernelSpec(AttentionSpec(CAUSAL, score=score), 64, 64, "bfloat16", arch))
    loops = ("forward", "backward_query", "backward_key_value", "backward_learned")
    entries = tuple(one for one in kernel.entries if one.label in (*loops, "merge_learned"))
    used = compiled(replace(kernel, entries=entries), arch, GROUP=2).resources
    # Elsewhere Dk and Dv, and what leaves sums, need a few registers more than there are.
    assert all(one.spills <= (0 if arch == "sm_90" else 128) for one in used.values())
    # A tile reads a bias once for each of its distances.
    assert kernel.source.count("near_0 = spread(w0_at, ") == len(loops)
    assert kernel.source.count("tl.load(w0 ") == len(loops)


def test_a_kernel_without_a_program_has_its_scale_in_the_exponent() -> None:
    plain, capped = (
        kernel_of(
            KernelSpec(AttentionSpec(CAUSAL, score=score), 64, 64, "bfloat16", "sm_90")
        ).source
        for score in (None, softcap(50.0))
    )
    assert plain.count("factor = scale * LOG2_E") == 3
    assert "tanh" not in plain
    assert "slope" not in plain
    assert capped.count("factor = LOG2_E\n") == capped.count("score = 50 * s_0\n") == 3
    assert capped.count("grad_score *= slope\n") == capped.count("slope = 1 - (s_0 * s_0)\n") == 2

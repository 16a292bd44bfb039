"""Attention that one tile holds: what is computed so, and the source of the kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.generators import generators
from sparse_compile.codegen.triton.aot import compile_ahead_of_time
from sparse_compile.codegen.triton.short.source import short_kernel
from sparse_compile.codegen.triton.short.spec import ShortKernelSpec, is_short
from sparse_compile.expr import KV, N_Q, SCORE, B, H, MaskExpr, Q, ScoreProgram, learned
from sparse_compile.spec import AttentionSpec

W0 = learned(0)
PLAIN = AttentionSpec(MaskExpr(KV <= Q))


def _biased(lookup: sympy.Expr) -> AttentionSpec:
    return AttentionSpec(MaskExpr(sympy.true), score=ScoreProgram(SCORE + lookup, ("bfloat16",)))


WINDOWS = _biased(W0(0, H, Q, KV))
ENTRIES = _biased(W0(B, H, Q, KV))


def _call(
    spec: AttentionSpec,
    n: tuple[int, int] = (49, 49),
    heads: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (32, 32),
    dtype: torch.dtype = torch.bfloat16,
) -> AttentionCall:
    q = torch.zeros(1, heads[0], n[0], dims[0], dtype=dtype)
    k = torch.zeros(1, heads[1], n[1], dims[0], dtype=dtype)
    v = torch.zeros(1, heads[1], n[1], dims[1], dtype=dtype)
    return AttentionCall(q, k, v, [], [], [], 1.0, spec)


@pytest.mark.parametrize("spec", [PLAIN, WINDOWS, ENTRIES], ids=["plain", "windows", "entries"])
def test_few_queries_and_keys_are_one_tile(spec: AttentionSpec) -> None:
    assert is_short(_call(spec))
    assert is_short(_call(spec, n=(1, 64)))


def test_what_one_tile_does_not_hold() -> None:
    assert not is_short(_call(PLAIN, n=(65, 49)))
    assert not is_short(_call(PLAIN, n=(49, 65)))
    assert not is_short(_call(PLAIN, n=(0, 49)))
    assert not is_short(_call(PLAIN, heads=(4, 2)))
    assert not is_short(_call(PLAIN, dims=(32, 80)))
    assert not is_short(_call(PLAIN, dims=(40, 32), dtype=torch.float32))
    assert not is_short(replace(_call(PLAIN), whole=False))
    # Sums by distance are made by other kernels.
    assert not is_short(_call(_biased(W0(H, KV - Q + N_Q - 1))))


def test_what_entries_share_is_read_before_the_loop_over_them() -> None:
    def source(attention: AttentionSpec) -> str:
        return short_kernel(ShortKernelSpec(attention, 32, 32, "bfloat16", "sm_90", 64, 64)).source

    of_heads, of_entries = source(WINDOWS), source(ENTRIES)
    loop = "for number in range"
    assert "tl.load(w0" in of_heads.split("def forward")[1].split(loop)[0]
    assert "tl.load(w0" not in of_entries.split("def forward")[1].split(loop)[0]
    assert "sum_0 +=" in of_heads
    assert "sum_0" not in of_entries


def test_the_same_spec_gives_the_same_bytes() -> None:
    spec = ShortKernelSpec(WINDOWS, 32, 32, "bfloat16", "sm_90", 64, 64)
    assert short_kernel(spec).source == short_kernel(replace(spec)).source
    assert generators().choose(spec).generator == "triton"


@pytest.mark.parametrize(
    ("spec", "dim", "arch"),
    [
        (PLAIN, 64, 90),
        (WINDOWS, 32, 90),
        (WINDOWS, 64, 80),
        (WINDOWS, 64, 100),
        (ENTRIES, 32, 90),
        (ENTRIES, 64, 90),
    ],
)
def test_compiles_ahead_of_time(spec: AttentionSpec, dim: int, arch: int) -> None:
    made = ShortKernelSpec(spec, dim, dim, "bfloat16", f"sm_{arch}", 64, 64)
    for name, used in compile_ahead_of_time(made).items():
        assert used.shared <= 96 * 1024, name
        # Biases of pairs, and the sums of their gradients, are kept from entry to entry; what sm_80
        # multiplies is in registers as well.
        assert used.spills <= (640 if arch == 80 else 256), (name, used.spills)

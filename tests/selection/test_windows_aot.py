"""The kernel that scores windows compiles for the architectures that are supported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy

from sparse_compile.codegen.runtime.generated import load_module
from sparse_compile.codegen.triton.aot import SHORT, Resources
from sparse_compile.codegen.triton.layout.key import Key
from sparse_compile.codegen.triton.selection.window_source import WindowSpec, window_source
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.spec.view import natural
from tests.selection.test_choose_aot import Options, resources

CAUSAL = MaskExpr(KV <= Q)
STRIDES = "q_stride_b", "q_stride_h", "key_stride_part"


def used_by(
    heads: int, dim: int, arch: int, mask: MaskExpr = CAUSAL, dtype: str = "bfloat16"
) -> Resources:
    key = replace(Key.of(mask, [], natural(1), natural(16)), span=256)
    spec = WindowSpec(key, heads, dim, dtype, 2, 2, 4, 1, True, f"sm_{arch}")
    kernel = load_module(spec.name, window_source(spec)).window_scores
    pointers = {"Q": SHORT[dtype], "KEYS": SHORT[dtype], "SCORES": "fp32"}
    types = {"factor": "fp32", **{name: f"*{kind}" for name, kind in pointers.items()}}
    options = Options(spec.options["num_warps"], spec.options["num_stages"])
    return resources(kernel, types, options, arch, STRIDES)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_of_many_heads(arch: int) -> None:
    used = used_by(16, 128, arch)
    assert used.spills == 0
    assert used.shared <= (200 << 10 if arch in (90, 100) else 99 << 10)
    assert arch != 90 or "wgmma" in used.ptx


@pytest.mark.parametrize("arch", [80, 90])
def test_of_one_head(arch: int) -> None:
    used = used_by(1, 128, arch, MaskExpr(sympy.true), "float16")
    assert used.spills <= 64
    assert used.shared <= (200 << 10 if arch == 90 else 99 << 10)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_of_many_channels(arch: int) -> None:
    used = used_by(4, 256, arch)
    # Ampere holds products and queries in registers.
    assert used.spills <= (1024 if arch == 80 else 64)
    assert used.shared <= (227 << 10 if arch != 80 else 99 << 10)

"""The kernels that choose compile for the architectures that are supported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import sympy

from sparse_compile.codegen.runtime.generated import load_module
from sparse_compile.codegen.triton.aot import SHORT, Resources, compiled
from sparse_compile.codegen.triton.layout.key import Key
from sparse_compile.codegen.triton.selection.index_source import IndexSpec, index_source, tiles
from sparse_compile.codegen.triton.selection.source import ChooseSpec, choose_source
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.spec.view import natural

CAUSAL = MaskExpr(KV <= Q)
RULES = ["top_k", "top_ratio", "top_p", "scores", "softmax"]
TYPES = {"SCORES": "*fp32", "VISIBLE": "*i1", "RULE": "*fp64", "INDEX": "*i32", "COUNT": "*i32"}


@dataclass(frozen=True)
class Options:
    warps: int
    stages: int = 1


def resources(
    kernel: Any, types: dict[str, str], options: Options, arch: int, strides: Sequence[str] = ()
) -> Resources:
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = [n for n in signature if n.isupper() or n in ("q_stride_n", "k_stride_n", *strides)]
    return compiled(kernel, signature, {}, aligned, options, arch)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("given", [False, True])
def test_choose(rule: str, given: bool, arch: int) -> None:
    if given and rule != "top_k":
        pytest.skip("what is visible does not depend on the rule")
    key = Key.of(MaskExpr(sympy.true) if given else CAUSAL, [], natural(1), natural(64))
    for blocks, room in ((1024, 16), (32768, 2048), (2048, 64), (1 << 17, 2048)):
        if rule != "top_k" and blocks > 1024:
            continue
        spec = ChooseSpec(key, given, rule, blocks, room)
        kernel = load_module(spec.name, choose_source(spec)).choose
        used = resources(kernel, TYPES, Options(spec.warps), arch)
        # Rows of 32768 scores leave 64 registers to a thread.
        assert used.spills <= 128
        assert used.shared <= 99 << 10


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_index_scores(dtype: str, arch: int) -> None:
    run_q, run_kv, half = *tiles(dtype), dtype == "bfloat16"
    for heads, dim in ((3, 40), (32, 128), *(((64, 128), (100, 64)) if half else ())):
        key = Key.of(CAUSAL, [], natural(run_q), natural(run_kv))
        spec = IndexSpec(key, True, heads, dim, dtype, f"sm_{arch}")
        kernel = load_module(spec.name, index_source(spec)).index_scores
        types = {"SCORES": "*fp32", "factor": "fp32"}
        types |= {name: f"*{SHORT[dtype]}" for name in "QKW"}
        options = Options(spec.options["num_warps"], spec.options["num_stages"])
        used = resources(kernel, types, options, arch)
        assert used.spills <= 128
        assert used.shared <= 99 << 10
        assert not half or arch != 90 or "wgmma" in used.ptx

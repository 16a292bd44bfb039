"""The kernels that choose compile for the architectures that are supported."""

from __future__ import annotations

import pytest
import sympy

from sparse_compile.codegen.triton.aot import compiled
from sparse_compile.codegen.triton.layout.key import Key
from sparse_compile.codegen.triton.selection.choose import ChooseSpec, choose_kernel
from sparse_compile.codegen.triton.selection.index_scores import IndexSpec, index_kernel, tiles
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.spec.view import natural

CAUSAL = MaskExpr(KV <= Q)
RULES = ["top_k", "top_ratio", "top_p", "scores", "softmax"]


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
        used = compiled(choose_kernel(spec), arch).resources["choose"]
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
        used = compiled(index_kernel(spec), arch).resources["index_scores"]
        assert used.spills <= 128
        assert used.shared <= 99 << 10
        assert not half or arch != 90 or "wgmma" in used.ptx

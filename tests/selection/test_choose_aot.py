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


#: Blocks that there are to choose from, and room for those that are chosen. All for sm_90; for the
#: others the one that takes most registers.
SIZES = ((1024, 16), (32768, 2048), (2048, 64), (1 << 17, 2048))
GIVEN = "top_k of what is given"
#: All for sm_90; for the others one that ranks and one that adds up.
CHOOSE = [*((rule, 90) for rule in (*RULES, GIVEN))]
CHOOSE += [(rule, arch) for rule in ("top_k", "top_p") for arch in (80, 100)]


@pytest.mark.parametrize(("rule", "arch"), CHOOSE)
def test_choose(rule: str, arch: int) -> None:
    # What is visible does not depend on the rule.
    rule, _, given = rule.partition(" of ")
    key = Key.of(MaskExpr(sympy.true) if given else CAUSAL, [], natural(1), natural(64))
    several = rule == "top_k" and (SIZES if arch == 90 and not given else SIZES[1:2])
    for blocks, room in several or SIZES[:1]:
        spec = ChooseSpec(key, bool(given), rule, blocks, room)
        used = compiled(choose_kernel(spec), arch).resources["choose"]
        # Rows of 32768 scores leave 64 registers to a thread.
        assert used.spills <= 128
        assert used.shared <= 99 << 10


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_index_scores(dtype: str, arch: int) -> None:
    run_q, run_kv, half = *tiles(dtype), dtype == "bfloat16"
    shapes = ((3, 40), (32, 128), *(((64, 128), (100, 64)) if half else ()))
    for heads, dim in shapes if arch == 90 else shapes[:1] if arch == 80 else shapes[-1:]:
        key = Key.of(CAUSAL, [], natural(run_q), natural(run_kv))
        spec = IndexSpec(key, True, heads, dim, dtype, f"sm_{arch}")
        used = compiled(index_kernel(spec), arch).resources["index_scores"]
        assert used.spills <= 128
        assert used.shared <= 99 << 10
        assert not half or arch != 90 or "wgmma" in used.ptx

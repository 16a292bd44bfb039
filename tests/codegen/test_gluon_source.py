"""The forward in Gluon: who gets it, its text, and what it uses when compiled without a GPU."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import sympy
import triton

from sparse_compile.codegen.generators import ShapeNeed, generators
from sparse_compile.codegen.gluon.generator import GLUON
from sparse_compile.codegen.gluon.source import depends_on_distances
from sparse_compile.codegen.runtime.launch import launchers_of
from sparse_compile.codegen.triton.aot import compiled
from sparse_compile.codegen.triton.blocks.source import kernel_of
from sparse_compile.expr import (
    KV,
    SCORE,
    B,
    Dropout,
    FloorDiv,
    FloorMod,
    H,
    MaskExpr,
    Q,
    ScoreProgram,
    table,
)
from sparse_compile.expr import size_symbol as size
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.layout.views.split_views import choose_views
from sparse_compile.spec import AttentionSpec, KernelSpec
from sparse_compile.spec.block_shape import GPU_SHAPES
from sparse_compile.spec.target import Target
from sparse_compile.spec.view import Order, View

CAUSAL = MaskExpr(KV <= Q)
WINDOW = MaskExpr((KV <= Q) & (Q - KV < 1000))
PREFIX = MaskExpr((KV <= Q) | (KV < size(0)), n_sizes=1)
BY_HEAD = MaskExpr((KV <= Q) & (Q - KV < 256 * (H + 1)))
H200 = Target("cuda", "sm_90", 132)


def spec_of(mask: MaskExpr = CAUSAL, dim: int = 64, dtype: str = "bfloat16") -> KernelSpec:
    block_q = 192 if dim == 64 else 128
    attention = AttentionSpec(mask, block_q=block_q, block_kv=128, where=("model.py:12",))
    return KernelSpec(attention, dim, dim, dtype, "sm_90")


def changed(**fields: object) -> KernelSpec:
    """A spec that it serves, but for some fields of its attention."""
    return replace(spec_of(), attention=replace(spec_of().attention, **fields))  # type: ignore[arg-type]


def looking_up() -> KernelSpec:
    documents = sympy.Eq(table(0)(B, Q), table(0)(B, KV))
    return spec_of(MaskExpr((KV <= Q) & documents, ("int64",)))


def in_other_order() -> KernelSpec:
    residues = Order((64, 1), (128,), (1, 0))
    return changed(block_q=64, block_kv=64, coverage=(View(KV <= Q, residues, residues),))


REFUSED = {
    "sm_90": replace(spec_of(), arch="sm_100"),
    "float32": spec_of(dtype="float32"),
    "features wide": replace(spec_of(), head_dim=80),
    "192 x 128, not 64 x 64": changed(block_q=64, block_kv=64),
    "plain order": in_other_order(),
    "score programs": changed(score=ScoreProgram(SCORE * 2)),
    "drops no": changed(dropout=Dropout(0.1, 0)),
    "look nothing up": looking_up(),
    "call no floor_mod": spec_of(MaskExpr(sympy.Ne(FloorMod(Q - KV, 3), 1))),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_refuses_triton_serves(reason: str) -> None:
    chosen = generators().choose(REFUSED[reason])
    assert chosen.generator == "triton"
    ((name, why),) = chosen.refused
    assert (name, reason in why) == ("gluon", True), why


def test_the_forward_is_its_own_and_all_else_is_beside_it() -> None:
    kernel = generators().choose(spec_of()).kernel
    launchers = launchers_of(kernel)
    assert set(launchers) == {entry.label for entry in kernel_of(spec_of()).entries}
    assert launchers["forward"].function.is_gluon()
    assert not launchers["merge_forward"].function.is_gluon()
    # A part of a split line is what one warpgroup computes, here as there.
    tile = launchers["forward"].entry.tile
    assert (tile.m, tile.together * tile.m) == (64, 192)
    assert "TILE: tl.constexpr = 64" in kernel.beside[0].source


@pytest.mark.parametrize("spec", [spec_of(PREFIX), spec_of(BY_HEAD, 128)], ids=["64", "128"])
def test_text_is_the_same_each_time_and_fits_the_page(spec: KernelSpec) -> None:
    text = GLUON.generate(spec).source
    assert text == GLUON.generate(spec).source
    compile(text, spec.name, "exec")
    assert not re.search(r"\$[A-Z]", text)
    lines = [line for line in text.splitlines() if not line.startswith("@")]
    assert max(map(len, lines)) <= 100
    assert "at       model.py:12" in text
    assert str(spec.attention.mask) in text


def test_only_partial_blocks_are_masked() -> None:
    text = GLUON.generate(spec_of(WINDOW)).source
    assert text.count("keep = ") == 1
    assert "if PARTIAL:\n        score = masked(" in text


def test_masks_of_distances_are_told_by_numbers_that_the_compiler_knows() -> None:
    assert depends_on_distances(WINDOW.predicate)
    assert depends_on_distances((KV <= Q + size(0)) & (Q - KV < 256 * (H + 1)))
    assert not depends_on_distances(PREFIX.predicate)
    assert not depends_on_distances(sympy.Eq(FloorDiv(Q, 8), FloorDiv(KV, 8)))
    assert "kv = column & -7" in GLUON.generate(spec_of(WINDOW)).source
    assert "kv = kv0 + gl.arange" in GLUON.generate(spec_of(PREFIX)).source


@pytest.mark.parametrize(
    "spec",
    [
        spec_of(CAUSAL),
        spec_of(WINDOW, 64, "float16"),
        spec_of(PREFIX),
        spec_of(CAUSAL, 128),
        spec_of(BY_HEAD, 128, "float16"),
    ],
    ids=lambda spec: f"{spec.attention.mask}-{spec.head_dim}-{spec.dtype}",
)
def test_compiles_ahead_of_time(spec: KernelSpec) -> None:
    kernel = GLUON.generate(spec)
    used = compiled(replace(kernel, beside=()), 90, GROUP=8).resources["forward"]
    assert "wgmma.mma_async" in used.ptx
    assert "cp.async.bulk.tensor.4d" in used.ptx
    assert used.shared <= 227 * 1024
    # Four warps that load are three too many, but registers are handed out to warpgroups.
    assert used.registers * 128 * (kernel.entries[0].tile.together + 1) <= 65536
    if triton.__version__.startswith("3.6."):  # Later ones bring another ptxas.
        # A mask of other than distances holds a few more numbers, beside the loop over FULL blocks.
        assert used.spills <= (64 if spec.attention.mask == PREFIX else 0)


def need(mask: MaskExpr, n: int = 16384, heads: int = 64, **other: object) -> ShapeNeed:
    known = {"head_dim": 64, "value_dim": 64, "dtype": "bfloat16", "target": H200} | other
    return ShapeNeed(
        attention=AttentionSpec(mask),
        shape=ProblemShape(1, heads, n, n),
        **known,  # type: ignore[arg-type]
    )


def chosen(asked: ShapeNeed) -> tuple[int, int]:
    """The block shape that is chosen."""
    assert asked.attention is not None
    assert asked.shape is not None
    shapes = generators().block_shapes(asked)
    spec, _ = choose_views(asked.attention.mask, asked.shape, shapes=shapes)
    return spec.block_q, spec.block_kv


def test_long_lists_get_its_blocks_and_narrow_windows_do_not() -> None:
    assert chosen(need(CAUSAL)) == chosen(need(PREFIX)) == chosen(need(WINDOW)) == (192, 128)
    assert chosen(need(CAUSAL, head_dim=128, value_dim=128)) == (128, 128)
    assert chosen(need(MaskExpr((KV <= Q) & (Q - KV < 128)))) == (64, 64)
    # Its backward visits as many pairs more.
    assert chosen(need(CAUSAL, trained=True)) == (192, 128)
    assert chosen(need(MaskExpr((KV <= Q) & (Q - KV < 512)), trained=True)) == (64, 64)


@pytest.mark.parametrize(
    "other",
    [
        {"target": Target("cuda", "sm_80", 108)},
        {"target": Target("cuda", "sm_100", 148)},
        {"dtype": "float32"},
        {"head_dim": 80, "value_dim": 80},
        {"head_dim": 64, "value_dim": 128},
        {"n": 512},
        {"heads": 1, "n": 2048},
    ],
    ids=str,
)
def test_others_get_the_shapes_of_triton(other: dict[str, object]) -> None:
    asked = need(CAUSAL, **other)  # type: ignore[arg-type]
    assert generators().block_shapes(asked) == GPU_SHAPES
    assert generators().block_shapes(replace(asked, attention=None)) == GPU_SHAPES


def test_masks_with_a_period_may_want_another_order() -> None:
    strided = MaskExpr((KV <= Q) & sympy.Eq(FloorMod(KV, 128), 0))
    assert generators().block_shapes(need(strided)) == GPU_SHAPES

"""Text of the kernels for selected keys: the same each time, compiled for every architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy

from sparse_compile.codegen.triton.aot import compile_ahead_of_time, compiled
from sparse_compile.codegen.triton.selected.source import selected_kernel
from sparse_compile.codegen.triton.selected.spec import SelectedKernelSpec
from sparse_compile.codegen.triton.selected.union_lists import UNITE
from sparse_compile.codegen.triton.selected.united import constants_of, union_tile
from sparse_compile.expr import KV, B, H, MaskExpr, Q, size_symbol, table
from sparse_compile.spec import AttentionSpec

CAUSAL = MaskExpr(KV <= Q)
DOCUMENTS = MaskExpr((KV <= Q) & sympy.Eq(table(0)(B, Q), table(0)(B, KV)), ("int32",))
RUN_TIME = MaskExpr((KV <= Q + size_symbol(0)) & (Q - KV < table(0)(H)), ("int64",), 1)


def spec_of(
    mask: MaskExpr = CAUSAL,
    unit_q: int = 1,
    unit_kv: int = 64,
    dim: int = 128,
    members: int = 16,
    dtype: str = "bfloat16",
    arch: str = "sm_90",
    value_dim: int | None = None,
) -> SelectedKernelSpec:
    selected = replace(AttentionSpec.of_units(mask, unit_q, unit_kv), where=("model.py:12",))
    shared = value_dim is not None
    value_dim = value_dim or dim
    return SelectedKernelSpec(selected, dim, value_dim, dtype, arch, members, shared)


SPECS = {
    "blocks of 64": spec_of(),
    "blocks of 128": spec_of(unit_kv=128, dim=64),
    "blocks of 16, groups of 5": spec_of(unit_kv=16, members=5, dim=64),
    "tokens": spec_of(unit_kv=1),
    "queries in blocks": spec_of(unit_q=64, members=1, dim=64),
    "documents": spec_of(DOCUMENTS, dim=64),
    "run-time sizes": spec_of(RUN_TIME, dim=64, members=3),
    "wide": spec_of(dim=256, members=8),
    "latent": spec_of(unit_kv=1, dim=576, value_dim=512, members=128),
    "single precision": spec_of(dtype="float32", dim=32, members=4),
}
#: Those with a kernel over unions of lists: few rows, and units of keys that fill a tile.
UNITED = {
    *("blocks of 64", "blocks of 128", "blocks of 16, groups of 5"),
    *("documents", "run-time sizes", "wide"),
}


@pytest.mark.parametrize("name", SPECS)
def test_text_is_the_same_each_time_and_fits_the_page(name: str) -> None:
    text = selected_kernel(SPECS[name]).source
    assert text == selected_kernel(SPECS[name]).source
    compile(text, name, "exec")
    assert "$" not in text
    assert "model.py:12" in text
    assert str(SPECS[name].attention.mask) in text


#: Which texts of kernels there are; the other specs differ in sizes and masks.
KINDS = ("tokens", "documents", "single precision")
#: All but "blocks of 128", which are as those of 64, and "documents": "run-time sizes" reads a
#: table, too, and KINDS has it for the other architectures.
COMPILED = [name for name in SPECS if name not in ("blocks of 128", "documents")]


@pytest.mark.parametrize(
    ("name", "arch"), [*((n, 90) for n in COMPILED), *((n, a) for n in KINDS for a in (80, 100))]
)
def test_the_kernels_compile(name: str, arch: int) -> None:
    spec = SPECS[name]
    if arch != 90:  # Wide heads take longest to compile: for sm_90 alone.
        dim = min(spec.head_dim, 32)
        spec = replace(spec, head_dim=dim, value_dim=dim)
    found = compile_ahead_of_time(spec, arch)
    by_key = {"forward_by_key", "backward_key_value"}
    assert set(found) == {"forward", "merge", "backward_query"} | (
        set() if SPECS[name].adds_by_query else by_key
    ) | ({"forward_latent"} if name == "latent" and arch == 90 else set()) | (
        {"forward_union"} if name in UNITED else set()
    )
    for kernel, used in found.items():
        limit = 163 * 1024 if arch == 80 else 227 * 1024
        assert used.shared <= limit, (kernel, used.shared)
    assert found["forward"].spills == 0 or name == "latent"
    if name in UNITED and arch == 90:
        assert found["forward_union"].spills == 0
        assert "wgmma" in found["forward_union"].ptx


def test_the_forward_yields_only_where_unions_can_serve() -> None:
    for name, spec in SPECS.items():
        assert (union_tile(spec) is not None) == (name in UNITED)
        assert ("BALANCE" in selected_kernel(spec).source) == (name in UNITED)


@pytest.mark.parametrize(("arch", "neighbours", "most"), [(80, 12, 9), (90, 4, 16), (100, 4, 16)])
def test_the_kernel_that_unites_lists_compiles(arch: int, neighbours: int, most: int) -> None:
    constants = constants_of(neighbours, most, 100)
    used = compiled(UNITE, arch, **constants).resources["unite_lists"]
    assert used.spills <= 16
    assert used.shared <= 16 * 1024

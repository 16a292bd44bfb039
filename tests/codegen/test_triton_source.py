"""Generated source: deterministic, readable, shown as it runs, compiled without a GPU."""

from __future__ import annotations

import hashlib
import inspect
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sympy
import triton

from sparse_compile.codegen.entry import Kernel, Resources
from sparse_compile.codegen.runtime import generated as cache
from sparse_compile.codegen.triton.aot import compile_ahead_of_time, compiled
from sparse_compile.codegen.triton.blocks.sections import first_token_function
from sparse_compile.codegen.triton.blocks.source import kernel_of
from sparse_compile.codegen.triton.blocks.tiles import tiles_for
from sparse_compile.expr import (
    KV,
    SCORE,
    B,
    FloorDiv,
    FloorMod,
    H,
    MaskExpr,
    Q,
    ScoreProgram,
    learned,
    table,
)
from sparse_compile.expr import size_symbol as size
from sparse_compile.spec import AttentionSpec, KernelSpec
from sparse_compile.spec.view import Order, View, natural

LOOPS = ("forward", "backward_query", "backward_key_value")
T0, T1 = table(0), table(1)
CAUSAL = MaskExpr(KV <= Q)
DOCUMENTS = MaskExpr((KV <= Q) & sympy.Eq(T0(B, Q), T0(B, KV)), ("int64",))
EVERYTHING = MaskExpr(
    (KV <= Q + size(0))
    & sympy.Eq(T0(B, Q), T0(B, KV))
    & (Q - KV < T1(H))
    & sympy.Ne(FloorMod(Q - KV, 3), 1)
    & sympy.Eq(FloorDiv(Q - KV, 32), 0),
    ("int64", "int32"),
    1,
)


def spec_of(mask: MaskExpr = CAUSAL, dims: int = 64, dtype: str = "bfloat16") -> KernelSpec:
    attention = AttentionSpec(mask, where=("model.py:12 in forward", "attention.py:34 in sdpa"))
    return KernelSpec(attention, dims, dims, dtype, "sm_90")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_COMPILE_CACHE_DIR", str(tmp_path / "kernels"))


def digest() -> str:
    return hashlib.sha256(kernel_of(spec_of(EVERYTHING)).source.encode()).hexdigest()


def test_same_spec_gives_same_bytes_in_every_process() -> None:
    """Sets and dictionaries of the other process have another order than those of this one."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    other = subprocess.run(
        [sys.executable, "-c", "import tests.codegen.test_triton_source as t; print(t.digest())"],
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "."},
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout == f"{digest()}\n"


def test_tables_that_the_score_alone_reads_are_parameters() -> None:
    score = ScoreProgram(SCORE + learned(0)(T0(FloorDiv(Q, 8), FloorDiv(KV, 8)), H), ("float32",))
    attention = AttentionSpec(replace(CAUSAL, tables=("int64",)), score=score)
    kernel = kernel_of(KernelSpec(attention, 64, 64, "bfloat16", "sm_90"))
    for entry in kernel.entries:
        read = "merge" not in entry.name
        assert ("t0" in {one.name for one in entry.parameters}) == read, entry.name
    assert "t0           table, int64, 2 dimensions" in kernel.source


def test_header_names_the_mask_and_where_it_came_from() -> None:
    source = kernel_of(spec_of(EVERYTHING)).source
    assert "mask     (kv <= q + s0) & " in source
    assert "at       model.py:12 in forward\nat       attention.py:34 in sdpa\n" in source
    assert "t1           table, int32, 1 dimensions" in source
    assert "s0           size, a run-time integer" in source


def test_full_blocks_have_no_mask() -> None:
    """What the mask computes in a loop stands under one condition: the block is PARTIAL."""
    kernels = kernel_of(spec_of(EVERYTHING)).source.split("@triton.jit(")[1:]
    looping = [kernel for kernel in kernels if "for i in range" in kernel]
    assert len(looping) == 3
    for kernel in looping:
        loop = kernel.partition("for i in range")[2].partition("lo, hi = lo - ")[0].splitlines()
        (start,) = (n for n, line in enumerate(loop) if "if i < n_partial_0 * STEPS:" in line)
        inside = len(loop[start]) - len(loop[start].lstrip()) + 4
        end = next(n for n, line in enumerate(loop) if n > start and line[:inside].strip())
        assert any("keep = " in line for line in loop[start:end])
        for word in ("keep", "t0", "floor_"):
            assert not any(word in line for line in loop[:start] + loop[end:])


@pytest.mark.parametrize(
    "order",
    [
        Order((64, 1), (128,), (1, 0)),
        Order((8, 8), (128,), (0, 1), ((120, 128),)),
        Order((4, 4), (8,), (0, 1)),
        Order((1, 2, 4), (4, 8), (1, 2, 0)),
        Order((2, 2, 4), (6, 8), (2, 0, 1), ((2, 6), (4, 8))),
    ],
    ids=str,
)
def test_first_tokens_are_those_of_the_order(order: Order) -> None:
    source = first_token_function("first", order).replace("@triton.jit", "")
    names: dict[str, Any] = {}
    exec(source, names)
    for n in (1, 63, 64, 65, 1000, 8193):
        for block in range(order.blocks(n)):
            assert names["first"](block, n) == order.base(block, n)


def test_text_cannot_escape_its_docstring() -> None:
    where = ('a"""b.py:1', "c\\d.py:2", "$NAME $Q.py:3")
    spec = replace(spec_of(), attention=replace(spec_of().attention, where=where))
    source = kernel_of(spec).source
    compile(source, "kernel", "exec")
    assert "$NAME $Q.py:3" in source


def test_what_is_shown_is_what_runs() -> None:
    spec = spec_of()
    module = cache.load_module(spec.name, kernel_of(spec).source)
    path = cache.write_source(spec.name, kernel_of(spec).source)
    assert path.read_text() == kernel_of(spec).source
    assert module.__file__ == str(path)
    assert inspect.getsource(module.forward.fn) in path.read_text()
    assert cache.load_module(spec.name, kernel_of(spec).source) is module


def test_a_changed_file_is_written_again_and_never_run() -> None:
    path = cache.write_source("sample", "value = 1\n")
    path.write_text("raise RuntimeError\n")
    assert cache.load_module("sample", "value = 1\n").value == 1
    assert path.read_text() == "value = 1\n"
    assert cache.load_module("sample", "value = 2\n").value == 2


def test_tracebacks_show_the_source() -> None:
    module = cache.load_module("failing", "def fail():\n    return 1 // 0  # here\n")
    with pytest.raises(ZeroDivisionError) as caught:
        module.fail()
    assert "# here" in str(caught.traceback[-1].statement)


def test_an_unwritable_cache_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_COMPILE_CACHE_DIR", "/proc/nowhere")
    path = cache.write_source("elsewhere", "value = 3\n")
    assert path.read_text() == "value = 3\n"
    assert cache.load_module("elsewhere", "value = 3\n").value == 3


def test_a_module_that_fails_is_not_kept() -> None:
    with pytest.raises(NameError):
        cache.load_module("broken", "undefined\n")
    with pytest.raises(NameError):
        cache.load_module("broken", "undefined\n")


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "interpreter"])
def test_tiles_divide_the_block(block: int, arch: str) -> None:
    for dims in (8, 33, 64, 80, 128, 256):
        for dtype in ("bfloat16", "float32"):
            attention = AttentionSpec(CAUSAL, block_q=block, block_kv=128)
            tiles = tiles_for(KernelSpec(attention, dims, dims, dtype, arch))
            for tile in (tiles.forward, tiles.backward_query, tiles.backward_key_value):
                assert block % tile.m == 0
                assert 128 % tile.n == 0
                assert not (tile.descriptors and (dims % 8 or min(tile.m, tile.n) < 32))


SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
NEAR, STRIDED = CAUSAL.predicate & (Q - KV < 128), sympy.Eq(FloorMod(Q - KV, 128), 0) & (KV <= Q)
CHUNK, SUMMARY = sympy.Eq(FloorDiv(Q, 128), FloorDiv(KV, 128)), FloorMod(KV, 128) >= 120
PLAIN, RESIDUES = natural(64), Order((64, 1), (128,), (1, 0))
COLUMNS = Order((8, 8), (128,), (0, 1), ((120, 128),))


def in_views(
    *views: View, exact: bool = True, tables: tuple[str, ...] = (), n_sizes: int = 0
) -> KernelSpec:
    mask = MaskExpr(sympy.Or(*(view.predicate for view in views)), tables, n_sizes)
    attention = AttentionSpec(mask, block_q=64, block_kv=64, coverage=views)
    return KernelSpec(attention, 128, 128, "bfloat16", "sm_90", exact)


SPARSE = in_views(View(NEAR, PLAIN, PLAIN), View(STRIDED & ~NEAR, RESIDUES, RESIDUES))
FIXED = in_views(View(CHUNK, PLAIN, PLAIN), View(SUMMARY & ~CHUNK, PLAIN, COLUMNS))

#: Views whose predicates read tables and sizes, and divide.
READING = in_views(
    View(CHUNK & EVERYTHING.predicate, PLAIN, PLAIN),
    View(SUMMARY & ~CHUNK & EVERYTHING.predicate, PLAIN, COLUMNS),
    tables=EVERYTHING.tables,
    n_sizes=EVERYTHING.n_sizes,
)


def narrow(spec: KernelSpec, arch: int) -> KernelSpec:
    """The same kernels of 32 features, which compile in less than half the time."""
    return replace(spec, arch=f"sm_{arch}", head_dim=32, value_dim=32)


#: Each kind of kernel for each architecture: the loops, of the first section and of one more, and
#: what merges. For sm_90 besides what takes another path of the generator: lengths that are no
#: multiples of the radix, heads that fill no tile, those that the copy engine cannot read, the
#: widest ones, and single precision. SPARSE as it is, and half of FIXED,
#: test_views_are_read_by_the_copy_engine looks at.
COMPILED = [
    (80, narrow(READING, 80)),
    (90, narrow(replace(SPARSE, exact=False), 90)),
    (90, spec_of(CAUSAL, 256)),
    (90, spec_of(CAUSAL, 24, "float32")),
    (90, spec_of(EVERYTHING, 40, "float16")),
    (90, spec_of(MaskExpr(sympy.true), 33)),
    (100, narrow(READING, 100)),
]


@pytest.mark.parametrize(
    ("arch", "spec"), COMPILED, ids=lambda x: x if isinstance(x, int) else x.name
)
def test_compiles_ahead_of_time(arch: int, spec: KernelSpec) -> None:
    compile_and_check(spec, arch)


def compile_and_check(spec: KernelSpec, arch: int) -> Mapping[str, Resources]:
    """What the kernels use: no more than there is."""
    resources = compile_ahead_of_time(spec, arch, group=4)
    assert set(LOOPS) < set(resources)
    check_resources(resources, spec, arch)
    return resources


def check_resources(resources: Mapping[str, Resources], spec: KernelSpec, arch: int) -> None:
    for name, used in resources.items():
        assert used.shared <= SHARED_MEMORY[arch], name
        assert 0 < used.registers <= 255
        loops = name.partition(",")[0] in LOOPS
        if arch == 90 and spec.dtype != "float32" and loops:
            assert "wgmma.mma_async" in used.ptx, name


@pytest.mark.parametrize(("dims", "dtype"), [(256, "bfloat16"), (128, "float32")])
def test_the_largest_tiles_fit_in_the_least_shared_memory(dims: int, dtype: str) -> None:
    """Of all architectures sm_89 has least of it; the loops of a backward hold most."""
    spec = replace(spec_of(CAUSAL, dims, dtype), arch="sm_89")
    used = only(kernel_of(spec), "backward", 89)
    assert set(used) == {"backward_query", "backward_key_value"}
    check_resources(used, spec, 89)


def only(kernel: Kernel, label: str, arch: int) -> Mapping[str, Resources]:
    """The resources of some of the kernels: those whose labels start so."""
    entries = tuple(entry for entry in kernel.entries if entry.label.startswith(label))
    return compiled(replace(kernel, entries=entries), arch, GROUP=4).resources


@pytest.mark.parametrize("dims", [64, 128])
@pytest.mark.parametrize("mask", [CAUSAL, DOCUMENTS], ids=["causal", "documents"])
def test_hot_loops_fit_in_registers(mask: MaskExpr, dims: int) -> None:
    resources = compiled(kernel_of(spec_of(mask, dims)), 90, GROUP=1).resources
    # Dk and Dv at 128 need all 255 registers; what spills is a few addresses, used once a tile.
    allowed = 64 if dims == 128 else 0
    if triton.__version__.startswith("3.6."):  # Later ones bring another ptxas.
        assert resources["forward"].spills == 0
        assert resources["backward_query"].spills == 0
        assert resources["backward_key_value"].spills <= allowed
    # Two programs share a multiprocessor: 228 KB, of which each also takes 1 KB.
    for used in resources.values():
        assert 2 * (used.shared + 1024) <= 228 * 1024
        assert used.registers * 128 * 2 <= 65536


def test_sections_are_launches_and_views_of_one_section_share_them() -> None:
    launches = {entry.label for entry in kernel_of(SPARSE).entries}
    assert {"forward, section 1", "backward_key_value, section 1"} < launches
    launches = {entry.label for entry in kernel_of(FIXED).entries}
    # The queries have one order: nothing is merged. The keys have two.
    assert "forward, section 1" not in launches
    assert "backward_query, section 1" not in launches
    assert "backward_key_value, section 1" in launches


def test_views_are_read_by_the_copy_engine_and_fit_in_registers() -> None:
    resources = dict(compile_and_check(SPARSE, 90))
    assert set(resources) == {entry.label for entry in kernel_of(SPARSE).entries}
    # What reads the columns; its other loops are in one section, as those of plain kernels.
    resources |= {f"fixed: {k}": v for k, v in only(kernel_of(FIXED), "forward", 90).items()}
    for name, used in resources.items():
        if name.startswith(("forward", "backward_query", "fixed")):
            assert "cp.async.bulk.tensor.5d" in used.ptx or "section" not in name
            if triton.__version__.startswith("3.6."):
                assert used.spills == 0


@pytest.mark.parametrize("spec", [SPARSE, FIXED], ids=["strided", "fixed"])
def test_lengths_that_are_no_multiples_of_the_radix_are_read_by_pointers(spec: KernelSpec) -> None:
    kernel = kernel_of(replace(narrow(spec, 90), exact=False))
    (forward,) = (entry for entry in kernel.entries if entry.label == "forward")
    used = compiled(replace(kernel, entries=(forward,)), 90, GROUP=4).resources["forward"]
    assert "cp.async.bulk.tensor.5d" not in used.ptx


def test_kernels_name_their_views() -> None:
    source = kernel_of(SPARSE).source
    assert "# View 1 of 2: queries in boxes of 64 x 1 over radix 128" in source
    assert "view 0   (kv <= q) & (-kv + q < 128)" in source

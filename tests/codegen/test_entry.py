"""Entries: text, launch and compilation follow from one declaration; prepared launches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sparse_compile.codegen.entry import (
    Entry,
    Kernel,
    Kind,
    Parameter,
    constants,
    integers,
    lists,
    number,
    pointers,
    sizes,
)
from sparse_compile.codegen.prepared import Launch, Launches
from sparse_compile.codegen.runtime import launch as launch_module
from sparse_compile.codegen.runtime.launch import Launcher

ENTRY = Entry(
    "scale_rows",
    (
        pointers("bfloat16", "X") + pointers("float32", "Y"),
        integers("x_stride_n") + integers("t0_stride0", assumed=1),
        lists("items") + sizes("n") + number("factor"),
        *constants(TILE=64, SECTION=0),
    ),
    {"num_warps": 4},
)


def test_signature_and_types_follow_from_the_declaration() -> None:
    assert ENTRY.signature == [
        '@triton.jit(do_not_specialize=["items", "n"])',
        "def scale_rows(",
        "    X, Y,",
        "    x_stride_n, t0_stride0,",
        "    items, n, factor,",
        "    TILE: tl.constexpr,",
        "    SECTION: tl.constexpr,",
        "):",
    ]
    types = {p.name: p.type for p in ENTRY.parameters}
    assert types == {
        **{"X": "*bf16", "Y": "*fp32", "x_stride_n": "i32", "t0_stride0": "constexpr"},
        **{"items": "*i32", "n": "i32", "factor": "fp32"},
        **{"TILE": "constexpr", "SECTION": "constexpr"},
    }
    assert [p.name for p in ENTRY.parameters if p.is_aligned] == ["X", "Y", "x_stride_n"]
    later = ENTRY.of_section(2, frozenset(["items"]))
    assert later.label == "scale_rows, section 2"
    assert later.parameters[-1].assumed == 2
    assert later.signature == ENTRY.signature


def test_values_are_given_by_name_and_all_of_them() -> None:
    values = {name: place for place, name in enumerate(ENTRY.names)}
    shuffled = dict(reversed(list(values.items())))
    assert ENTRY.ordered({**shuffled, "other": None}) == list(range(9))
    del shuffled["n"], shuffled["X"]
    with pytest.raises(TypeError, match="scale_rows was not given X, n"):
        ENTRY.ordered(shuffled)


class Compiled:
    """Stands for a compiled kernel: notes what it is run with."""

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.runs.append((grid, *arguments))


def prepared(monkeypatch: pytest.MonkeyPatch, **more: Any) -> tuple[Launch, Compiled, list[Any]]:
    """A launch of ENTRY, what it runs, and what Triton was asked."""
    compiled, asked = Compiled(), []

    def launched(self: Launcher, grid: tuple[int, ...], arguments: list[Any]) -> Any:
        asked.append(arguments)
        return compiled

    monkeypatch.setattr(launch_module.Launcher, "launched", launched)
    launcher = Launcher(Kernel("by hand", "", (ENTRY,), {"scale_rows": None}), ENTRY)
    values = {"x_stride_n": 8, "t0_stride0": 1, "n": 4, "factor": 0.5, "TILE": 64, "SECTION": 0}
    return Launch(launcher, {**values, **more}, given()), compiled, asked


def given(**more: Any) -> dict[str, Any]:
    """What a call gives."""
    x, y = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(4, 8)
    return {"X": x, "Y": y, "items": torch.zeros(4, dtype=torch.int32), **more}


def test_a_repeated_launch_fills_in_addresses_only(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, compiled, asked = prepared(monkeypatch)
    first, second = given(), given()
    launch((3,), first)
    assert asked[0][:2] == [first["X"], first["Y"]]
    assert not compiled.runs
    launch((3,), second)
    addresses = [second[name].data_ptr() for name in ("X", "Y", "items")]
    assert compiled.runs == [((3, 1, 1), *addresses[:2], 8, 1, addresses[2], 4, 0.5, 64, 0)]
    assert len(asked) == 1


def test_a_tensor_that_is_not_aligned_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, compiled, asked = prepared(monkeypatch)
    odd = given(Y=torch.zeros(40)[1:33].view(4, 8))
    launch((3,), odd)
    launch((3,), given())
    launch((3,), odd)
    assert len(asked) == 3
    assert not compiled.runs
    launch((3,), given(items=torch.zeros(5, dtype=torch.int32)[1:]))  # compiled for any address
    assert len(asked) == 3
    assert len(compiled.runs) == 1


def test_numbers_and_grids_may_differ_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    _, compiled, asked = prepared(monkeypatch)
    launcher = Launcher(Kernel("by hand", "", (ENTRY,), {"scale_rows": None}), ENTRY)
    values = {"x_stride_n": 8, "t0_stride0": 1, "TILE": 64, "SECTION": 0}
    launch = Launch(launcher, values, given(n=4, factor=0.5))
    for grid, n, factor in ((3,), 4, 0.5), ((3,), 1, 0.25), ((5,), -6, 1.0), ((3,), 16, 1.0):
        launch(grid, given(n=n, factor=factor))
    seen = [(run[0], run[6], run[7]) for run in compiled.runs]
    assert seen == [((3, 1, 1), 1, 0.25), ((5, 1, 1), -6, 1.0), ((3, 1, 1), 16, 1.0)]
    assert len(asked) == 1
    launch((3,), given(n=1 << 31, factor=1.0))  # has another type in a kernel
    assert len(asked) == 2


def test_what_a_section_has_no_use_for_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    _, compiled, _ = prepared(monkeypatch)
    entry = ENTRY.of_section(1, frozenset(["Y", "n"]))
    launcher = Launcher(Kernel("by hand", "", (entry,), {"scale_rows": None}), entry)
    launches = Launches(
        {entry.label: launcher}, {"x_stride_n": 8, "t0_stride0": 1, "factor": 0.5, "n": 3}
    )
    for _ in range(2):
        launches.start("scale_rows, section 1", (1,), given(), TILE=32)
    (run,) = compiled.runs
    assert run[2] is run[6] is None
    assert run[8:] == (32, 1)


def test_descriptors_are_made_once_for_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    _, compiled, _ = prepared(monkeypatch)
    tiles = Parameter("TILES", Kind.DESCRIPTOR, "float32", block=(1, 1, 2, 2, 8), tensor="X")
    entry = Entry("read", (pointers("float32", "Y"), (replace(tiles, radices=(4,)),)))
    first = given(X=torch.zeros(2, 3, 16, 8))
    launch = Launch(Launcher(Kernel("by hand", "", (entry,), {"read": None}), entry), {}, first)
    for _ in range(3):
        launch((3,), first)
    made, again = (run[2] for run in compiled.runs)
    assert made is again
    assert made.base.data_ptr() == first["X"].data_ptr()
    assert made.shape == [2, 3, 4, 4, 8]
    assert made.strides == [384, 128, 32, 8, 1]
    assert made.block_shape == [1, 1, 2, 2, 8]
    launch((3,), {**first, "X": torch.zeros(2, 3, 16, 8)})
    assert compiled.runs[-1][2] is not made


def test_a_kernel_is_compiled_for_the_values_of_its_constants() -> None:
    launcher = Launcher(Kernel("by hand", "", (ENTRY,), {"scale_rows": None}), ENTRY)
    values = {**given(), "x_stride_n": 8, "t0_stride0": 1, "n": 4, "factor": 0.5, "SECTION": 0}
    keys = [
        launcher.compiled_for(ENTRY.ordered({**values, "TILE": tile, **more}))
        for tile, more in ((64, {}), (128, {}), (64, {"SECTION": 2}), (64, {"n": 5}))
    ]
    assert keys[0] not in keys[1:3]
    assert keys[0] == keys[3]

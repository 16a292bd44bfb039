"""Entries: text, launch and compilation follow from one declaration; launches by name."""

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
from sparse_compile.codegen.repeated import Bound
from sparse_compile.codegen.runtime.launch import Launcher
from sparse_compile.codegen.triton.calls import Operands, Prepared, Running

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


def given(**more: Any) -> dict[str, Any]:
    """What a call gives."""
    x, y = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(4, 8)
    return {"X": x, "Y": y, "items": torch.zeros(4, dtype=torch.int32), **more}


def started(entry: Entry, monkeypatch: pytest.MonkeyPatch, **values: Any) -> list[Any]:
    """What Triton is given for a launch of an entry, of which a call gives some values."""
    asked: list[Any] = []
    monkeypatch.setattr(Launcher, "launched", lambda self, grid, values: asked.append(values))
    launcher = Launcher(Kernel("by hand", "", (entry,), {entry.name: None}), entry)
    shared = {"x_stride_n": 8, "t0_stride0": 1, "n": 4, "factor": 0.5}
    prepared = Prepared(None, Operands(1.0, (), ()), {entry.label: launcher}, shared)
    call: Any = None
    Running(prepared, call, given(**values)).start(entry.label, (3,), {}, TILE=32)
    (found,) = asked
    assert isinstance(found, list)
    return found


def test_what_a_section_has_no_use_for_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ENTRY.of_section(1, frozenset(["Y", "n"]))
    found = started(entry, monkeypatch)
    assert found[1] is found[5] is None
    assert found[7:] == [32, 1]


TILES = Parameter("TILES", Kind.DESCRIPTOR, "float32", block=(1, 1, 2, 2, 8), tensor="X")
READ = Entry("read", (pointers("float32", "Y"), (replace(TILES, radices=(4,)),)))


def test_a_descriptor_takes_tokens_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    x = torch.zeros(2, 3, 16, 8)
    _, made = started(READ, monkeypatch, X=x)
    assert made.base is x
    assert made.shape == [2, 3, 4, 4, 8]
    assert made.strides == [384, 128, 32, 8, 1]
    assert made.block_shape == [1, 1, 2, 2, 8]


def test_a_bound_launch_fills_in_addresses_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    tensors = given(X=torch.zeros(2, 3, 16, 8))
    arguments = [*started(READ, monkeypatch, **tensors), 7, None]
    places = {tensors["Y"].data_ptr(): (0, 0), tensors["X"].data_ptr(): (1, 4)}
    compiled = Compiled()
    bound = Bound.of(compiled, (3, 1, 1), arguments, lambda t: places[t.data_ptr()])
    for addresses in ([160, 320], [160, 320], [160, 640]):
        bound(addresses, device=0)
    assert [run[0] for run in compiled.runs] == [(3, 1, 1)] * 3
    assert [(run[1], *run[3:]) for run in compiled.runs] == [(160, 7, None)] * 3
    assert not any(isinstance(kept, torch.Tensor) for kept in bound.start.arguments)
    first, again, other = (run[2] for run in compiled.runs)
    assert first is again  # made once for an address
    assert (first.base.data_ptr(), other.base.data_ptr()) == (324, 644)
    assert first.shape == other.shape == [2, 3, 4, 4, 8]


def test_a_kernel_is_compiled_for_the_values_of_its_constants() -> None:
    launcher = Launcher(Kernel("by hand", "", (ENTRY,), {"scale_rows": None}), ENTRY)
    values = {**given(), "x_stride_n": 8, "t0_stride0": 1, "n": 4, "factor": 0.5, "SECTION": 0}
    keys = [
        launcher.compiled_for(ENTRY.ordered({**values, "TILE": tile, **more}))
        for tile, more in ((64, {}), (128, {}), (64, {"SECTION": 2}), (64, {"n": 5}))
    ]
    assert keys[0] not in keys[1:3]
    assert keys[0] == keys[3]

"""The fuzzer itself: it sees mistakes, shortens programs, and adds up what it saw."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from torch.fx import GraphModule

sys.path.insert(0, str(Path(__file__).parents[2]))  # where a plain `pytest` does not look

from benchmarks.fuzz.__main__ import run
from benchmarks.fuzz.check import Invalid
from benchmarks.fuzz.draw import draw
from benchmarks.fuzz.program import Joined, Piece, Program, Sizes, source
from benchmarks.fuzz.results import Summary, from_json, to_json, total
from benchmarks.fuzz.shrink import shrunk
from sparse_compile.passes import pipeline


def test_every_seed_is_a_program() -> None:
    """That there are no two ways to read a seed, and that all choices occur."""
    drawn = [draw(seed) for seed in range(600)]
    assert drawn == [draw(seed) for seed in range(600)]
    assert len(set(drawn)) == len(drawn)
    assert {program.dtype for program in drawn} == {"float32", "bfloat16", "float16"}
    assert {program.sizes.rank for program in drawn} == {2, 3, 4, 5}


def test_a_mistake_is_seen_and_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(gm: GraphModule, *_: Any) -> tuple[()]:
        for node in gm.graph.find_nodes(op="call_method", target="masked_fill"):
            node.replace_all_uses_with(node.args[0])
        gm.recompile()
        return ()

    monkeypatch.setattr(pipeline, "run", broken)
    masks = (Joined(Piece("window")), Joined(Piece("padding")))
    program = Program(masks=masks, grad=True, weights=("contiguous",))
    assert "output" in run(program).mismatch
    least = shrunk(program, lambda other: bool(run(other).mismatch))
    assert len(least.masks) == 1
    assert (least.grad, least.weights) == (False, ())


def test_what_does_not_run_in_eager_is_no_mismatch() -> None:
    with pytest.raises(Invalid, match="must match"):
        run(Program(sizes=Sizes(H=3, G=2)))


def test_summaries_add_up() -> None:
    left = Summary(((0, 3),), 4, 3, {"a": 1}, {"a": 2}, 1)
    right = Summary(((3, 5),), 2, 0, {"b": 1, "a": 1}, {"a": 3, "b": 4})
    both = total([right, left])
    assert (both.programs, both.sites, both.rewritten) == (5, 6, 3)
    assert both.left == {"a": 2, "b": 1}
    assert set(both.examples) == {"a", "b"}
    assert both.seeds == ((0, 5),)
    assert from_json(to_json(both)) == both


def test_a_source_is_a_script_of_its_own() -> None:
    names: dict[str, object] = {}
    exec(source(draw(3)), names)
    assert callable(names["program"])
    assert callable(names["inputs"])

"""What the fuzzer found, in its plainest form."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # where a plain `pytest` does not look

from benchmarks.fuzz.__main__ import run
from benchmarks.fuzz.check import SEEDS, compared, values
from benchmarks.fuzz.idiom import Numbers
from benchmarks.fuzz.program import Added, Joined, Piece, Program, Sizes, source

EMPTY = (Joined(Piece("rows are empty")),)
TEMPERATURE = (Piece("temperature"),)

EQUAL = {
    # Of rounded outputs, what scores are multiplied with and made of has more than they have.
    "a temperature of steep scores": Program(
        sizes=Sizes(NQ=18, NK=77, D=20, E=8),
        steps=(Piece("clamped temperature"),),
        softmax="method",
        grad=True,
    ),
    "the projections of few tokens": Program(
        sizes=Sizes(B=2, NQ=10, NK=13, D=8, E=8),
        dtype="bfloat16",
        product="module",
        softmax="function",
        masks=(Joined(Piece("chunks after padding", Numbers(c=13))),),
        grad=True,
    ),
    "sinks of grouped heads": Program(sizes=Sizes(H=4, G=2), product="grouped einsum", sinks=True),
    "sinks of windows": Program(sizes=Sizes(B=3, H=4, G=4, rank=5), sinks=True, grad=True),
    # Rows whose keys all are in other regions: -100 and what else is added are one sum.
    "a sum that is added in float16": Program(
        dtype="float16",
        biases=(Added(Piece("pairs")), Added(Piece("regions", Numbers(c=3)))),
        masks=(Joined(Piece("strided", Numbers(c=1))),),
        grad=True,
    ),
    "distances that are added in bfloat16": Program(
        sizes=Sizes(NQ=64, NK=64), dtype="bfloat16", biases=(Added(Piece("distance")),), grad=True
    ),
    "zeros like scores that were written to": Program(
        steps=(Piece("in place"),), masks=(Joined(Piece("arange")),), hiding="added zeros"
    ),
    "zeros like what follows from them": Program(
        steps=(Piece("in place"), Piece("number")),
        masks=(Joined(Piece("arange")),),
        hiding="added zeros",
    ),
    # What is added is in another dtype than the mask, and so is the sum: it was read as a bias,
    # whose minimum is a row's whole log-sum-exp.
    "a mask that is added to integers": Program(
        product="sdpa",
        biases=(Added(Piece("integers")),),
        masks=EMPTY,
        hiding="added",
        fill="least",
        grad=True,
    ),
    "a mask that is added to what is trained in bfloat16": Program(
        product="sdpa",
        dtype="bfloat16",
        biases=(Added(Piece("pairs")),),
        masks=EMPTY,
        hiding="added",
        fill="least",
        grad=True,
    ),
    "infinity that is added to what is trained in float16": Program(
        product="module",
        dtype="float16",
        biases=(Added(Piece("all")),),
        masks=(Joined(Piece("tril")),),
        hiding="added",
        grad=True,
    ),
    # Masks of more axes than scores were not read beside a bias, as those of windows are not.
    "a mask of five axes": Program(
        sizes=Sizes(B=2, H=2, G=2, rank=5),
        product="sdpa",
        biases=(Added(Piece("pairs of heads")),),
        masks=(Joined(Piece("documents")), Joined(Piece("strided", Numbers(c=4)))),
        hiding="added",
        fill="least",
        grad=True,
    ),
    "a maximum before a floor": Program(masks=EMPTY, late=("maximum", "floor"), grad=True),
    "a maximum before a floor that ties": Program(
        masks=EMPTY, hiding="added", fill="least", late=("maximum", "floor"), grad=True
    ),
    "a number and one of the call": Program(
        steps=(Piece("times"), Piece("number of a tensor"), Piece("divided"), Piece("softcap")),
        masks=(Joined(Piece("padding")),),
        grad=True,
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_rewritten_and_equal(name: str) -> None:
    result = run(EQUAL[name])
    assert result.wrong == ""
    assert result.left == ("",)


@pytest.mark.parametrize(
    "name, off, tensor",
    [
        ("a temperature of steep scores", 1.01, "temperature"),
        ("the projections of few tokens", 1.1, "w_in"),
    ],
)
def test_what_cancels_hides_no_mistake(name: str, off: float, tensor: str) -> None:
    names: dict[str, Any] = {}
    exec(source(EQUAL[name]), names)
    given = names["inputs"](SEEDS[1])
    eager = values(names["program"], given, True)
    found = eager[tensor]
    assert found is not None
    assert bool(found.any())
    assert compared(eager, eager, names["program"], given, True) == ""
    wrong = {**eager, tensor: found * off}
    assert tensor in compared(wrong, eager, names["program"], given, True)


#: In training: eager's gradient is NaN.
NAN = {
    "a temperature": Program(steps=TEMPERATURE, masks=EMPTY, hiding="added", grad=True),
    "a bias": Program(biases=(Added(Piece("pairs")),), masks=EMPTY, hiding="added", grad=True),
    # Eager's output is NaN, too, which what was read as a bias did not yield.
    "a bias in the mask": Program(
        product="module",
        softmax="function",
        dtype="float16",
        biases=(Added(Piece("all")),),
        masks=EMPTY,
        hiding="added",
        grad=True,
    ),
}


@pytest.mark.parametrize("name", NAN)
def test_what_is_trained_beside_rows_of_nan(name: str) -> None:
    result = run(NAN[name])
    assert result.wrong == ""
    assert "has gradients of NaN" in result.left[0]


def test_the_least_number_of_float16_beside_what_is_trained() -> None:
    """It does not absorb what it is added to: rows without keys have a softmax over the rest."""
    bias = Added(Piece("pairs"))
    program = Program(product="sdpa", dtype="float16", biases=(bias,), masks=EMPTY, grad=True)
    result = run(replace(program, hiding="added", fill="least"))
    assert result.wrong == ""
    assert "may be as low as a mask's" in result.left[0]


def test_the_least_number_of_float16_before_a_scale() -> None:
    """It was read as a bias, of -32752; eager rounds to float16, and has the mean."""
    program = Program(dtype="float16", masks=EMPTY, hiding="added", fill="least")
    result = run(replace(program, late=("scaled",)))
    assert result.wrong == ""
    assert "adds finfo.min to float16 scores" in result.left[0]
    masked = run(replace(program, hiding="masked_fill", late=("scaled",)))
    assert (masked.wrong, masked.left) == ("", ("",))


def test_places_that_follow_from_sizes_of_the_call() -> None:
    """The heads of a bias are split by sizes that are symbols: they reached the executor once."""
    bias = Added(Piece("curve of a bias", Numbers(c=16)), how="minus")
    sizes = Sizes(H=4, G=2)
    result = run(Program(sizes=sizes, product="grouped einsum", biases=(bias,), dynamic=True))
    assert result.wrong == ""
    assert "sizes that are only known at run time" in result.left[0]


def test_sinks_of_merged_heads_without_a_mask() -> None:
    """Nothing else says that the scores have other axes than the products."""
    result = run(Program(sizes=Sizes(B=2, H=4, G=4), product="bmm, viewed", sinks=True))
    assert result.wrong == ""
    assert "sinks are columns of scores of merged batches" in result.left[0]

"""Mask functions of FlexAttention become the predicate that they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import and_masks, create_mask, or_masks

from sparse_compile import patterns as P
from sparse_compile.errors import BadPattern
from tests.patterns.brute import Reread

IDS = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 3]])
LENGTHS = torch.tensor([5, 8], dtype=torch.int32)
WINDOWS = torch.tensor([1, 2, 8])
KEEP = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1]).bool()
BIAS = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1])
OFFSET = torch.tensor(2)
CAUSAL: Callable[..., Any] = lambda b, h, q, kv: q >= kv


MASKS: dict[str, Callable[..., Any]] = {
    "causal": CAUSAL,
    "window": lambda b, h, q, kv: (q - kv <= 3) & (kv - q <= 1),
    "abs method": lambda b, h, q, kv: (q - kv).abs() <= 2,
    "abs function": lambda b, h, q, kv: torch.abs(q - kv) <= 2,
    "abs builtin": lambda b, h, q, kv: abs(q - kv) <= 2,
    "documents": lambda b, h, q, kv: IDS[b, q] == IDS[b, kv],
    "documents by rows": lambda b, h, q, kv: IDS[b][q] == IDS[b][kv],
    "documents of one entry": lambda b, h, q, kv: IDS[0, q] == IDS[0, kv],
    "padding": lambda b, h, q, kv: kv < LENGTHS[b],
    "window of each head": lambda b, h, q, kv: (q - kv < WINDOWS[h]) & (q >= kv),
    "bool tensor": lambda b, h, q, kv: KEEP[q] & KEEP[kv],
    "bool tensor counted": lambda b, h, q, kv: KEEP[q].int() + KEEP[kv] > 1,
    "offset": lambda b, h, q, kv: q + OFFSET >= kv,
    "offset on the left": lambda b, h, q, kv: OFFSET + q >= kv,
    "compared on the left": lambda b, h, q, kv: OFFSET <= kv,
    "numbers on the left": lambda b, h, q, kv: (8 - q <= kv) & (2 * q != kv) & (7 % (q + 1) == 0),
    "blocks": lambda b, h, q, kv: q // 3 == kv // 3,
    "remainders": lambda b, h, q, kv: (q - kv) % 3 == 0,
    "division": lambda b, h, q, kv: torch.div(q, 3, rounding_mode="floor") == kv // 3,
    "bits": lambda b, h, q, kv: (q >> 1) == (kv & 3) + (kv << 1) - kv * 2,
    "not": lambda b, h, q, kv: ~(q >= kv),
    "xor": lambda b, h, q, kv: (q >= kv) ^ (kv % 2 == 0),
    "equal truths": lambda b, h, q, kv: (q >= kv) == (kv % 2 == 0),
    "where": lambda b, h, q, kv: torch.where(h == 0, q >= kv, q <= kv),
    "where of numbers": lambda b, h, q, kv: torch.where(h == 0, q, 3) >= kv,
    "where of a number": lambda b, h, q, kv: torch.where(KEEP[q], q, kv - 1) >= kv,
    "extremes": lambda b, h, q, kv: torch.minimum(q, kv) >= torch.maximum(q, kv) - 2,
    "clamp": lambda b, h, q, kv: q.clamp(min=2, max=5) >= torch.clamp(kv, max=4),
    "logical": lambda b, h, q, kv: torch.logical_or(torch.logical_not(q < kv), kv == 0),
    "logical method": lambda b, h, q, kv: (q >= kv).logical_and(kv > 1),
    "bitwise": lambda b, h, q, kv: torch.bitwise_and(q >= kv, kv > 1),
    "negative index": lambda b, h, q, kv: BIAS[q - 3] >= BIAS[kv],
    "index by index": lambda b, h, q, kv: IDS[b, BIAS[q]] == IDS[b, kv],
    "made inside": lambda b, h, q, kv: torch.arange(8)[q] >= kv,
    "scalar of a tensor": lambda b, h, q, kv: kv < LENGTHS.max() - 1,
    "whole float": lambda b, h, q, kv: q - kv <= 4 / 2,
    "constant": lambda b, h, q, kv: q.new_ones((), dtype=torch.bool) & (q >= kv),
    "to bool": lambda b, h, q, kv: (kv % 2).to(torch.bool) | BIAS[q].bool(),
    "and_masks": and_masks(CAUSAL, lambda b, h, q, kv: IDS[b, q] == IDS[b, kv]),
    "or_masks": or_masks(CAUSAL, lambda b, h, q, kv: kv < LENGTHS[b]),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_function_means_what_flex_attention_makes_of_it(name: str) -> None:
    expected = create_mask(MASKS[name], 2, 3, 8, 8, device="cpu")
    pattern = P.Predicate(MASKS[name])
    assert pattern.dense(8, 8, 2, 3).expand(2, 3, 8, 8).equal(expected)
    assert Reread(pattern).dense(8, 8, 2, 3).expand(2, 3, 8, 8).equal(expected)


@pytest.mark.parametrize("value", [True, False])
def test_a_function_may_return_a_constant(value: bool) -> None:
    assert (P.Predicate(lambda b, h, q, kv: value).dense(3, 4) == value).all()


def branching(b: Any, h: Any, q: Any, kv: Any) -> Any:
    if q >= kv:
        return kv < 3
    return q < 3


COUNTER = [0]


def counting(b: Any, h: Any, q: Any, kv: Any) -> Any:
    COUNTER[0] += 1
    return q >= kv + COUNTER[0]


def writing(b: Any, h: Any, q: Any, kv: Any) -> Any:
    BIAS[0] = 3
    return q >= kv


def writing_at_coordinates(b: Any, h: Any, q: Any, kv: Any) -> Any:
    BIAS[q] = 3
    return q >= kv


def adding_in_place(b: Any, h: Any, q: Any, kv: Any) -> Any:
    tensor = BIAS
    tensor += 1
    return q >= kv


AND_OR = "Write & for `and`, | for `or`, ~ for `not`, and torch.where(...) for `if`."
READ_ONLY = "Compute the tensor before, and let the function only read it."
VOCABULARY = "Use + - * // % comparisons & | ~ torch.where and tensors indexed by b, h, q, kv."

REFUSED: list[tuple[Callable[..., Any], str, str]] = [
    (branching, "asks whether q >= kv is true, which differs from query to query", AND_OR),
    (lambda b, h, q, kv: q >= kv and kv > 2, "asks whether q >= kv is true", AND_OR),
    (lambda b, h, q, kv: not q >= kv, "asks whether q >= kv is true", AND_OR),
    (lambda b, h, q, kv: q in (1, 2), "asks whether Eq(q, 1) is true", AND_OR),
    (
        lambda b, h, q, kv: q - kv,
        "Predicate(<lambda>) returns -kv + q, which is neither true nor false",
        "Return a comparison, such as != 0.",
    ),
    (lambda b, h, q, kv: None, "returns None, which is neither true nor false", "comparison"),
    (counting, "says q >= kv + ", "A mask function must depend on its arguments only."),
    (
        lambda b, h, q, kv: (torch.rand(64) > 0.5)[q],
        "makes a tensor that differs from call to call",
        "Make it outside, and let the function only read it.",
    ),
    (writing, "changes a tensor in place (setitem)", READ_ONLY),
    (writing_at_coordinates, "changes a tensor in place (setitem)", READ_ONLY),
    (adding_in_place, "changes a tensor in place", READ_ONLY),
    (lambda b, h, q, kv: BIAS.mul_(2)[q] > kv, "changes a tensor in place (mul)", READ_ONLY),
    (
        lambda b, h, q, kv: torch.rand(8)[q] > 0.5,
        "reads a tensor of torch.float32",
        "Compare it before, outside of the function, and read the bools.",
    ),
    (lambda b, h, q, kv: q < 2.5, "computes with 2.5", "Use whole numbers only."),
    (lambda b, h, q, kv: q / 2 < kv, "divides with /", "Write // to stay with whole numbers."),
    (lambda b, h, q, kv: q % 0 == kv, "divides by zero", "Divide by another number."),
    (lambda b, h, q, kv: LENGTHS < q, "computes with a whole tensor of [2]", "Index it by b"),
    (lambda b, h, q, kv: IDS[b] == q, "computes with a row of a tensor", "Index it by as many"),
    (lambda b, h, q, kv: IDS[:, q] > 0, "indexes a tensor by slice", "slice the tensor before"),
    (lambda b, h, q, kv: BIAS[q > 2] > 0, "indexes a tensor by <q > 2>", "Use integers"),
    (lambda b, h, q, kv: BIAS[q, kv] > 0, "too many indices for a tensor of [8]", VOCABULARY),
    (lambda b, h, q, kv: [1, 2][q] > kv, "list indices must be integers", VOCABULARY),
    (lambda b, h, q, kv: q.sqrt() > kv, "coordinates have no 'sqrt'", VOCABULARY),
    (lambda b, h, q, kv: torch.sin(q) > kv, "calls torch's sin on coordinates", "minimum, maximum"),
    (lambda b, h, q, kv: q | kv, "combines the integer q with | or ^", "as in != 0."),
    (lambda b, h, q, kv: q & 5 == 0, "works on the bits of integers", "Write // and % instead."),
    (lambda b, h, q: q > 3, "takes 3 positional arguments but 4 were given", VOCABULARY),
]


@pytest.mark.parametrize("function, what, instead", REFUSED, ids=lambda case: "")
def test_what_a_function_cannot_do(function: Callable[..., Any], what: str, instead: str) -> None:
    before = BIAS.clone()
    with pytest.raises(BadPattern) as caught:
        P.Predicate(function).dense(8, 8)
    assert what in str(caught.value)
    assert instead in str(caught.value)
    assert BIAS.equal(before)


def test_errors_say_which_function() -> None:
    with pytest.raises(BadPattern, match=r"\(In branching\.\)$"):
        P.Predicate(branching).bound()


def test_tensors_of_the_closure_are_read_when_used() -> None:
    ids = torch.tensor([0, 0, 1])
    pattern = P.Predicate(lambda b, h, q, kv: ids[q] == ids[kv])
    bound = pattern.bound()
    ids[1] = 1
    (table,) = bound.tables("cpu", 3, 3, 1, 1)
    assert table.tolist() == [0, 1, 1]


def test_predicates_are_equal_when_their_functions_are() -> None:
    other: Callable[..., Any] = lambda b, h, q, kv: q >= kv
    assert P.Predicate(CAUSAL) == P.Predicate(CAUSAL)
    assert hash(P.Predicate(CAUSAL)) == hash(P.Predicate(CAUSAL))
    assert P.Predicate(CAUSAL) != P.Predicate(other)
    assert repr(P.Predicate(branching)) == "Predicate(branching)"
    assert repr(P.Predicate(CAUSAL, name="mine")) == "Predicate(mine)"


def test_a_function_composes_with_patterns() -> None:
    both = P.Predicate(lambda b, h, q, kv: kv % 2 == 0) & P.Causal()
    rows = both.dense(3, 3)[0, 0].int().tolist()
    assert rows == [[1, 0, 0], [1, 0, 0], [1, 0, 1]]

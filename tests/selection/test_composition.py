"""Masks that select, in attention(): against the dense mask, forward and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparse_compile
from sparse_compile import patterns as P
from sparse_compile.errors import BadPattern, BadShape, PatternMisuse
from sparse_compile.expr import KV, MaskExpr, Q, evaluate
from sparse_compile.ops import ATTENTION, LAYOUT
from sparse_compile.patterns.selecting import Selecting
from sparse_compile.reference import attention as reference
from sparse_compile.selection import Selection, canonical
from sparse_compile.selection.split import split
from sparse_compile.spec import AttentionSpec, EmptyRows
from tests.tolerance import relative_error

B, N = 2, 75
DOCUMENTS = P.Documents(torch.arange(N) // 30)


def index(
    lists: int = 1, most: int = 3, unit_q: int = 1, unit_kv: int = 16, n_q: int = N, n_kv: int = N
) -> Tensor:
    """Pads, repeated numbers and numbers out of range among them."""
    generator = torch.Generator().manual_seed(most)
    shape = (B, lists, -(-n_q // unit_q), most)
    return torch.randint(-2, -(-n_kv // unit_kv) + 1, shape, generator=generator)


def dense_of(mask: P.Pattern, chosen: Selecting, heads: int, n_q: int = N, n_kv: int = N) -> Tensor:
    """The mask by its parts: what is static, or selected and allowed for selected keys."""
    q, k = torch.zeros(B, heads, n_q, 1), torch.zeros(B, heads, n_kv, 1)
    found = chosen.select(q, k, None, [], []).dense(n_q, n_kv)
    found = found.repeat_interleave(heads // found.shape[1], 1)
    return _evaluate(mask, found, heads, n_q, n_kv)


def _evaluate(mask: P.Pattern, chosen: Tensor, heads: int, n_q: int, n_kv: int) -> Tensor:
    rest = (chosen, heads, n_q, n_kv)
    if isinstance(mask, Selecting):
        return chosen
    if isinstance(mask, P.Not):
        return ~_evaluate(mask.part, *rest)
    if isinstance(mask, (P.And, P.Or)):
        first, *others = (_evaluate(part, *rest) for part in mask.parts)
        for other in others:
            first = first & other if isinstance(mask, P.And) else first | other
        return first
    return mask.dense(n_q, n_kv, B, heads)


def operands(q_heads: int, kv_heads: int, n_q: int, n_kv: int, dtype: Any) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (B, q_heads, n_q, 16), (B, kv_heads, n_kv, 16), (B, kv_heads, n_kv, 8)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def check(
    mask: P.Pattern,
    dense: Tensor,
    run: Callable[..., Tensor] = sparse_compile.attention,
    q_heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
) -> None:
    n_q, n_kv = dense.shape[-2:]
    ours = operands(q_heads, kv_heads, n_q, n_kv, dtype)
    exact = [t.detach().double().requires_grad_() for t in ours]
    out, (wanted, _) = run(*ours, mask), reference(*exact, dense)
    allowed = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_error(out, wanted) < allowed
    weight = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, ours, weight)
    wanted_grads = torch.autograd.grad(wanted, exact, weight.double())
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert relative_error(grad, wanted_grad) < allowed


CHOSEN = P.Selected(index(), unit_kv=16)
MASKS = [
    CHOSEN,
    P.Causal() & CHOSEN,
    P.Causal() & CHOSEN | P.SlidingWindow(9),
    P.Causal() & (CHOSEN | P.SlidingWindow(9) | P.Global(3)),
    DOCUMENTS & P.Causal() & (CHOSEN | P.SlidingWindow(9)),
    DOCUMENTS & CHOSEN,
    P.Padding((60, 75)) & (P.Causal() & CHOSEN | P.SlidingWindow(5)),
    CHOSEN | DOCUMENTS,
    P.Padding((60, 75)) & CHOSEN | P.Causal() & DOCUMENTS,
    P.Causal() & (CHOSEN | P.Strided(8)),
    P.Causal() | CHOSEN,
    P.heads([P.Causal(), P.SlidingWindow(20)], per=2) & CHOSEN | P.SlidingWindow(2),
    P.Causal() & CHOSEN | P.BigBird(block=16, random=1, global_=1, window=3),
    ~(~P.Causal() | ~CHOSEN),
    P.SlidingWindow(9) | CHOSEN & P.SlidingWindow(9),
    P.All() | CHOSEN,
    P.Causal() & ~P.Causal() & CHOSEN,
]


@pytest.mark.parametrize("mask", MASKS, ids=range(len(MASKS)))
def test_equals_the_dense_mask(mask: P.Pattern) -> None:
    check(mask, dense_of(mask, CHOSEN, 4))


@pytest.mark.parametrize(
    "heads", [(2, 2, 1), (4, 2, 2), (6, 2, 1), (14, 2, 2), (16, 1, 1)], ids=str
)
@pytest.mark.parametrize("units", [(1, 1), (1, 16), (16, 32), (64, 64)], ids=str)
def test_groups_and_units(heads: tuple[int, int, int], units: tuple[int, int]) -> None:
    q_heads, kv_heads, lists = heads
    unit_q, unit_kv = units
    chosen = P.Selected(index(lists, 3, unit_q, unit_kv), unit_kv, unit_q)
    mask = P.Causal() & chosen | P.SlidingWindow(6, 0)
    check(mask, dense_of(mask, chosen, q_heads), q_heads=q_heads, kv_heads=kv_heads)


@pytest.mark.parametrize("lengths", [(1, 75), (5, 75), (64, 64), (75, 40)], ids=str)
def test_lengths(lengths: tuple[int, int]) -> None:
    n_q, n_kv = lengths
    chosen = P.Selected(index(n_q=n_q, n_kv=n_kv), unit_kv=16)
    causal = P.Causal(align="lower_right")
    mask = causal & chosen | P.SlidingWindow(6, 0, align="lower_right")
    check(mask, dense_of(mask, chosen, 4, n_q, n_kv))


@pytest.mark.parametrize("lengths", [(0, 10, 2), (10, 0, 2), (10, 10, 0)], ids=str)
@pytest.mark.parametrize("window", [None, P.SlidingWindow(3)], ids=repr)
def test_nothing_to_select(lengths: tuple[int, int, int], window: P.Pattern | None) -> None:
    n_q, n_kv, most = lengths
    chosen = P.Selected(torch.zeros(B, 1, n_q, most, dtype=torch.int32), unit_kv=16)
    mask = P.Causal() & chosen if window is None else P.Causal() & chosen | window
    check(mask, dense_of(mask, chosen, 4, n_q, n_kv))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    mask = P.Causal() & CHOSEN | P.SlidingWindow(9)
    check(mask, dense_of(mask, CHOSEN, 4), dtype=dtype)


@pytest.mark.parametrize("fill", [-1, 2], ids=["nothing", "one block"])
@pytest.mark.parametrize("window", [None, P.SlidingWindow(3), P.BlockLocal(25) & P.Causal()])
def test_all_select_the_same(fill: int, window: P.Pattern | None) -> None:
    chosen = P.Selected(torch.full((B, 2, N, 4), fill), unit_kv=16)
    mask = P.Causal() & chosen if window is None else P.Causal() & chosen | window
    check(mask, dense_of(mask, chosen, 4))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_mask_of_parts(data: st.DataObject) -> None:
    static = st.sampled_from(
        [P.Causal(), P.SlidingWindow(7), P.SlidingWindow(4, 0), DOCUMENTS, P.Global(2), P.All()]
    )
    statics = static | static.map(lambda part: ~part)
    masks = st.recursive(
        statics | st.just(CHOSEN),
        lambda inner: st.builds(P.And, inner, inner) | st.builds(P.Or, inner, inner),
        max_leaves=6,
    )
    mask = P.And(P.Or(CHOSEN, data.draw(masks)), data.draw(masks))
    check(mask, dense_of(mask, CHOSEN, 4))


def test_several_selections_joined_by_or() -> None:
    other = P.Selected(index(lists=2, most=2), unit_kv=16)
    both = P.Selected(torch.cat([CHOSEN.index.expand(-1, 2, -1, -1), other.index], -1), 16)
    mask = P.Causal() & (CHOSEN | other) | P.SlidingWindow(4)
    check(mask, dense_of(P.Causal() & both | P.SlidingWindow(4), both, 4))


@pytest.mark.parametrize(
    "mask, message",
    [
        (P.Causal() & ~CHOSEN, "does not select, which is not supported. Select the keys to"),
        (P.heads([CHOSEN, P.Causal()], per=2), "A selection is made for all heads at once"),
        (P.Causal() & CHOSEN | P.Selected(index(most=2), 16), "Join them by | where they stand"),
        (CHOSEN & P.Selected(index(most=2), 16), "has 2 different selections"),
        (CHOSEN | P.Selected(index(most=2, unit_kv=8), 8), "selections in different units"),
        (P.Causal() & P.Selected(index(n_q=N + 1), 16), "[2, heads, 75, selected]"),
        (P.Causal() & P.Selected(index(lists=3), 16), "where heads divides 4"),
    ],
)
def test_what_cannot_be_composed(mask: P.Pattern, message: str) -> None:
    with pytest.raises((BadPattern, PatternMisuse)) as caught:
        sparse_compile.attention(*operands(4, 2, N, N, torch.float32), mask)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: P.Selected(torch.zeros(2, 3)), "torch.float32"),
        (lambda: P.Selected(torch.zeros(2, 3).bool()), "bools"),
        (lambda: P.Selected(torch.zeros(2, 3).long()), "Write [batch, heads, units of queries"),
        (lambda: P.Selected(index(), unit_kv=0), "Selected: unit_kv is 0"),
    ],
)
def test_bad_indices(make: Callable[[], P.Pattern], message: str) -> None:
    with pytest.raises(BadPattern) as caught:
        make()
    assert message in str(caught.value)


def test_selected_is_a_value() -> None:
    numbers = torch.tensor([[[[0, 2], [1, -1]]]])
    one = P.Selected(numbers, unit_kv=8)
    assert repr(one) == "Selected(tensor([[[[0, 2], [1, -1]]]]), unit_kv=8)"
    assert one == P.Selected(numbers, unit_kv=8)
    assert one != P.Selected(numbers, unit_kv=4)
    assert hash(one) == hash(P.Selected(numbers, unit_kv=8))
    assert P.Selected(((((0, 2), (1, -1)),),)).index == ((((0, 2), (1, -1)),),)
    with pytest.raises(PatternMisuse, match="selects keys by content"):
        one.dense(2, 16)


@dataclass(frozen=True, repr=False)
class Nearest(Selecting):
    """A selection by content: the unit of the key that a query's list of heads likes best."""

    unit_q, unit_kv = 1, 8

    def select(self, q: Tensor, k: Tensor, mask: Any, tables: Any, sizes: Any) -> Selection:
        lists = k.shape[1]
        grouped = q.unflatten(1, (lists, -1)).mean(2)
        best = (grouped @ k.mT).argmax(-1, keepdim=True) // self.unit_kv
        chosen = canonical(best, -(-k.shape[2] // self.unit_kv))
        return Selection(*chosen, self.unit_q, self.unit_kv)


@dataclass(frozen=True, repr=False)
class Allowed(Selecting):
    """Every unit in which its mask allows a pair."""

    unit_q, unit_kv = 1, 8

    def select(self, q: Tensor, k: Tensor, mask: Any, tables: Any, sizes: Any) -> Selection:
        (batch, heads, n_q, _), n_kv = q.shape, k.shape[2]
        where = {
            "b": torch.arange(batch).view(-1, 1, 1, 1),
            "h": torch.arange(heads).view(-1, 1, 1),
            "q": torch.arange(n_q)[:, None],
            "kv": torch.arange(n_kv),
        }
        dense = evaluate(mask, where, n_q, n_kv, tables, sizes).expand(batch, heads, n_q, n_kv)
        padded = torch.nn.functional.pad(dense, (0, -n_kv % self.unit_kv))
        some = padded.unflatten(-1, (-1, self.unit_kv)).any(-1)
        numbers = torch.arange(some.shape[-1]).expand(some.shape)
        return Selection(*canonical(numbers.masked_fill(~some, -1), some.shape[-1]), 1, 8)


@pytest.mark.parametrize(
    "mask",
    [
        P.Causal() & DOCUMENTS & Allowed() | P.SlidingWindow(4, 0),
        P.Padding((60, 75)) & (P.Causal() & Allowed() | P.BigBird(16, 1, 1, 3)),
        P.heads([P.Causal(), P.SlidingWindow(20)], per=2) & Allowed(),
    ],
    ids=range(3),
)
def test_a_selection_can_read_the_mask_that_it_gets(mask: P.Pattern) -> None:
    """So selecting all that it allows gives the mask as if everything were selected."""
    check(mask, _evaluate(mask, torch.ones(B, 4, N, N, dtype=torch.bool), 4, N, N))


@pytest.mark.parametrize("mask", MASKS[1:3], ids=range(2))
def test_autocast_changes_nothing(mask: P.Pattern) -> None:
    def run(*arguments: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return sparse_compile.attention(*arguments)

    with torch.autocast("cpu", torch.bfloat16):
        check(mask, dense_of(mask, CHOSEN, 4), run)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    mask = DOCUMENTS & P.Causal() & (CHOSEN | P.SlidingWindow(9))
    given_ = operands(4, 2, N, N, torch.float32)
    with mode():
        found = sparse_compile.attention(*given_, mask)
    wanted, _ = reference(*given_, dense_of(mask, CHOSEN, 4))
    assert relative_error(found, wanted) < 1e-5
    check(mask, dense_of(mask, CHOSEN, 4))


def test_a_selection_by_content() -> None:
    nearest = Nearest()
    q, k, _ = operands(4, 2, N, N, torch.float32)
    dense = nearest.select(q, k, None, [], []).dense(N, N).repeat_interleave(2, 1)
    mask = P.Causal() & nearest | P.SlidingWindow(3)
    check(mask, P.Causal().dense(N, N) & dense | P.SlidingWindow(3).dense(N, N))


def test_a_selection_is_made_among_what_the_static_part_leaves() -> None:
    seen: list[str] = []

    class Watched(Nearest):
        def select(self, q: Tensor, k: Tensor, mask: Any, tables: Any, sizes: Any) -> Selection:
            seen.append(str(mask))
            assert all(isinstance(t, Tensor) for t in tables)
            return super().select(q, k, mask, tables, sizes)

    given_ = operands(4, 2, N, N, torch.float32)
    sparse_compile.attention(*given_, DOCUMENTS & P.Causal() & Watched() | P.SlidingWindow(3, 0))
    assert seen == ["(kv <= q) & Eq(t0(q), t0(kv)) & (-kv + q > 3)"]


def test_a_wide_selection_leaves_nothing_to_merge() -> None:
    parts = split(P.Causal() & CHOSEN)
    assert parts.static is None
    assert str(parts.selected and parts.selected.expr) == "kv <= q"


@pytest.mark.parametrize("policy", EmptyRows)
def test_rows_without_keys_keep_their_policy(policy: EmptyRows) -> None:
    """Of a static and a selected part together: neither alone decides which rows are empty."""
    static, rest = (KV <= Q) & (Q < 20), (Q >= 10) & (Q < 60) & ~((KV <= Q) & (Q < 20))
    spec = AttentionSpec(MaskExpr(static), policy, 32, 32).with_units(MaskExpr(rest), 1, 16)
    found = CHOSEN.select(torch.zeros(B, 4, N, 1), torch.zeros(B, 2, N, 1), None, [], [])
    rows, keys = torch.arange(N)[:, None], torch.arange(N)
    allowed = (keys <= rows) & (rows < 20)
    rest_dense = (rows >= 10) & (rows < 60) & ~allowed
    dense = (found.dense(N, N) & rest_dense | allowed).expand(B, 4, N, N)
    ours = operands(4, 2, N, N, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in ours]
    shape = B, 4, N, N, 2
    blocks = LAYOUT([], "[]", [], *shape, spec.blocks.text, torch.device("cpu"), [])
    lists = [*blocks, found.index, found.count]
    out, lse = ATTENTION(*ours, [], [], [], lists, 0.25, spec.text)
    wanted, wanted_lse = reference(*exact, dense, 0.25, policy.value)
    torch.testing.assert_close(lse.double(), wanted_lse.detach(), rtol=1e-5, atol=1e-5)
    assert relative_error(out, wanted) < 1e-5
    weight = torch.randn(out.shape)
    grads = torch.autograd.grad(out, ours, weight)
    for grad, exact_grad in zip(
        grads, torch.autograd.grad(wanted, exact, weight.double()), strict=True
    ):
        assert relative_error(grad, exact_grad) < 1e-5


def test_the_operator_reports_a_selection_that_does_not_fit() -> None:
    class Wrong(Nearest):
        def select(self, q: Tensor, k: Tensor, mask: Any, tables: Any, sizes: Any) -> Selection:
            chosen = super().select(q, k, mask, tables, sizes)
            return Selection(chosen.index[:, :, 1:], chosen.count[:, :, 1:], 1, 8)

    with pytest.raises(BadShape, match=r"ceil\(Nq / unit_q\)"):
        sparse_compile.attention(
            *operands(4, 2, N, N, torch.float32), P.Causal() & Wrong() | P.SlidingWindow(3)
        )

"""How programs hide keys: every spelling is rewritten, and is what the program computes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.idioms import (
    INF,
    LOW,
    B,
    D,
    H,
    N,
    Program,
    assert_left,
    assert_rewritten,
    causal,
    left,
    qkv,
    right,
    visible,
)

sdpa = F.scaled_dot_product_attention


# Calls of scaled_dot_product_attention --------------------------------------------------------


def keywords(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return sdpa(query=q, key=k, value=v, attn_mask=visible(pad), dropout_p=0.0, is_causal=False)


def positional(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return sdpa(q, k, v, visible(pad), 0.0, False, scale=0.3)


def grouped(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return sdpa(q, k[:, :2], v[:, :2], visible(pad), enable_gqa=True)


def one_head_of_keys(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return sdpa(q, k[:, :1], v[:, :1], visible(pad))


def minima_for_sdpa(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return sdpa(q, k, v, torch.where(visible(pad), 0.0, LOW))


def infinities_for_sdpa(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return sdpa(q, k, v, torch.zeros(B, 1, N, N).masked_fill(visible(pad).logical_not(), -INF))


# Written out ----------------------------------------------------------------------------------


def filled(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(D)
    return torch.matmul(F.softmax(scores.masked_fill(~visible(pad), LOW), dim=-1), v)


def filled_with_infinity(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Rows that are fully masked are NaN."""
    return (q @ k.mT).masked_fill(visible(pad) == 0, -INF).softmax(-1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q * D**-0.5, k)
    weights = torch.where(visible(pad), scores, torch.full([], LOW)).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def added(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return (q @ k.mT * 0.25 + torch.where(visible(pad), 0.0, LOW)).softmax(-1) @ v


def added_infinity(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return (q @ k.mT * 0.25 + torch.where(visible(pad), 0.0, -INF)).softmax(-1) @ v


def added_by_baddbmm(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * H, N, D) for x in (q, k, v))
    hidden = torch.where(causal(), 0.0, LOW).expand(B * H, N, N)
    return torch.bmm(torch.baddbmm(hidden, q, k.mT, alpha=0.25).softmax(-1), v).view(B, H, N, D)


def one_minus_integers(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return (q @ k.mT * 0.25 + (1 - pad[:, None, None]) * LOW).softmax(-1) @ v


def one_minus_floats(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    inverted = 1.0 - pad[:, None, None].to(q.dtype)
    return (q @ k.mT * 0.25 + inverted * torch.finfo(q.dtype).min).softmax(-1) @ v


def one_minus_filled(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    inverted = 1.0 - pad[:, None, None].float()
    return sdpa(q, k, v, inverted.masked_fill(inverted.bool(), LOW))


def one_minimum_twice(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    hidden = torch.where(visible(pad), 0.0, LOW)
    return (q @ k.mT * 0.25 + hidden + hidden).softmax(-1) @ v


def masked_then_scaled(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """As MoBA: the scale comes last, and no mask is left to it."""
    return ((q @ k.mT).masked_fill(~visible(pad), -INF) * D**-0.5).softmax(-1) @ v


def minima_then_scaled(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return ((q @ k.mT + torch.where(visible(pad), 0.0, LOW)) / 4).softmax(-1) @ v


def implicit_head(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]) * 0.25
    weights = scores.masked_fill(~visible(pad), LOW).softmax(-1)
    return torch.einsum("bhqk,bkd->bhqd", weights, v[:, 0])


def softcapped(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT * 0.25 / 5.0) * 5.0
    return scores.masked_fill(~visible(pad), LOW).softmax(-1) @ v


# How masks are made ---------------------------------------------------------------------------


def by_tril(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return sdpa(q, k, v, torch.tril(torch.ones(N, N, dtype=torch.bool)))


def by_triu(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    hidden = torch.triu(torch.full((N, N), -INF), diagonal=1)
    return (q @ k.mT * 0.25 + hidden).softmax(-1) @ v


def by_a_band(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    ones = torch.ones(N, N, dtype=torch.bool)
    return sdpa(q, k, v, ones.tril() & ones.triu(-7))


def in_place(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    keep = torch.ones(N, N, dtype=torch.bool).tril_()
    keep[:, :3] = True
    keep &= torch.ones(N, N, dtype=torch.bool).triu(-9)
    return sdpa(q, k, v, keep)


def scores_in_place(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = q @ k.mT
    scores *= 0.25
    scores.masked_fill_(~visible(pad), LOW)
    return scores.softmax(-1) @ v


def by_vmap(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    def sees(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (pad[b, k] != 0)

    rows = torch.vmap(torch.vmap(sees, (None, None, 0)), (None, 0, None))
    at = torch.arange(N)
    return sdpa(q, k, v, torch.vmap(rows, (0, None, None))(torch.arange(B), at, at)[:, None])


def by_numpy(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    keep = torch.from_numpy(numpy.tril(numpy.ones((N, N), dtype=bool)))
    return (q @ k.mT).masked_fill(~keep, -INF).softmax(-1) @ v


CAUSAL, PADDED = "kv <= q", "kv <= q and t0[b, kv] != 0"

#: Masks with rows that are fully masked, but for those that the padding does not reach.
MASKS: dict[Program, str] = {
    **dict.fromkeys(
        [
            *(keywords, positional, grouped, one_head_of_keys),
            *(minima_for_sdpa, infinities_for_sdpa),
            *(filled, filled_with_infinity, chosen, added, added_infinity, one_minimum_twice),
            *(masked_then_scaled, minima_then_scaled, implicit_head, softcapped),
            *(scores_in_place, by_vmap),
        ],
        PADDED,
    ),
    **dict.fromkeys([added_by_baddbmm, by_tril, by_triu, by_numpy], CAUSAL),
    **dict.fromkeys([one_minus_integers, one_minus_floats, one_minus_filled], "t0[b, kv] != 0"),
    by_a_band: "kv <= q and q - kv < 8",
    in_place: "q - kv < 10 and (kv < 3 or kv <= q)",
}


@pytest.mark.parametrize("program", MASKS, ids=lambda program: program.__name__)
def test_masks(program: Program) -> None:
    assert assert_rewritten(program, *qkv(), left()).mask == MASKS[program]


class Buffered(nn.Module):
    """A mask for the longest sequence, of which a call reads a part."""

    def __init__(self) -> None:
        super().__init__()
        keep = torch.tril(torch.ones(64, 64, dtype=torch.bool)).view(1, 1, 64, 64)
        self.register_buffer("keep", keep, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.25).masked_fill(~self.keep[:, :, :N, :N], LOW)
        return scores.softmax(-1) @ v


def test_a_mask_in_a_buffer() -> None:
    assert assert_rewritten(Buffered(), *qkv()).mask == "tensor [1, 1, 40, 40]"


def layout_of(heads: int) -> Tensor:
    """Which blocks of 8 are attended to, bool [heads, 5, 5]; each attends to itself."""
    kept = torch.rand(heads, N // 8, N // 8, generator=torch.Generator().manual_seed(0)) < 0.4
    return kept | torch.eye(N // 8, dtype=torch.bool)


def blocks_by_index(layout: Tensor) -> Tensor:
    at = torch.arange(N)
    return layout[:, at[:, None] // 8, at // 8]


def blocks_by_head(layout: Tensor) -> Tensor:
    at = torch.arange(N)
    return layout[torch.arange(H)[:, None, None], at[:, None] // 8, at[None] // 8]


@pytest.mark.parametrize("heads", [1, H])
@pytest.mark.parametrize("made", [blocks_by_index, blocks_by_head], ids=lambda f: f.__name__)
def test_a_table_of_blocks(made: Callable[[Tensor], Tensor], heads: int) -> None:
    """It is read as it is, and no tensor of all pairs exists."""

    def program(q: Tensor, k: Tensor, v: Tensor, layout: Tensor) -> Tensor:
        keep = made(layout.expand(H, -1, -1)) & causal()
        return (q @ k.mT * 0.25).masked_fill(~keep, LOW).softmax(-1) @ v

    shown = assert_rewritten(program, *qkv(), layout_of(heads)).mask
    head = "h" if heads > 1 else "0"
    assert shown == f"kv <= q and t0[{head}, q // 8, kv // 8] != 0"


def test_numbers_of_blocks() -> None:
    """A table of integers that is compared, for queries that come last."""

    def program(q: Tensor, k: Tensor, v: Tensor, level: Tensor) -> Tensor:
        n_q, n_kv = q.shape[2], k.shape[2]
        at = torch.arange(n_q)[:, None] + n_kv - n_q
        return sdpa(q, k, v, level[at // 8, torch.arange(n_kv) // 8] > 2)

    level = torch.arange(25, dtype=torch.int32).view(5, 5) * 7 % 9
    shown = assert_rewritten(program, *qkv(n_q=16), level).mask
    assert shown.startswith("t0[")
    assert "kv // 8" in shown


def test_a_table_of_pairs_is_a_tensor() -> None:
    def by_token(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        at = torch.arange(N)
        return sdpa(q, k, v, seen[0, at[:, None], at])

    def by_kind(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        kind = seen[0, 0].cumsum(0)
        return sdpa(q, k, v, seen[0][kind[:, None], kind])

    seen = torch.rand(1, N, N, generator=torch.Generator().manual_seed(1)) < 0.5
    for program in (by_token, by_kind):
        assert assert_rewritten(program, *qkv(), seen).mask == "tensor [1, 1, 40, 40]"


def test_elements_of_a_tensor() -> None:
    """A table without axes; and one of bits that index another."""

    def gated(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~(causal() | seen[0, 2, 3]), LOW).softmax(-1) @ v

    def by_bits(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        kind = seen[0, 0].long()
        return (q @ k.mT).masked_fill(~seen[0][kind[:, None], kind], LOW).softmax(-1) @ v

    seen = torch.rand(1, N, N, generator=torch.Generator().manual_seed(1)) < 0.5
    assert assert_rewritten(gated, *qkv(), seen).mask == "kv <= q or t0[] != 0"
    assert_rewritten(by_bits, *qkv(), seen)


def test_a_length_that_changes() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        keep = (at <= at[:, None]) & pad[:, None, None].bool()
        return sdpa(q, k, v, keep)

    assert assert_rewritten(program, *qkv(), left(), dynamic=True).mask == PADDED


# Half precision -------------------------------------------------------------------------------


def low_added(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    hidden = torch.zeros(B, 1, N, N, dtype=q.dtype).masked_fill(
        ~visible(pad), torch.finfo(q.dtype).min
    )
    return (q @ k.mT * 0.25 + hidden).softmax(-1) @ v


def low_filled(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.25).masked_fill(~visible(pad), torch.finfo(q.dtype).min)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def low_of_fp32(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Scores are fp32 from the mask on."""
    scores = q @ k.mT * 0.25 + (1.0 - pad[:, None, None].float()) * LOW
    return scores.softmax(-1).to(q.dtype) @ v


def one_minus_half(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """As BERT did: a mask where the padding is 0 or 1."""
    inverted = 1 - pad[:, None, None].to(q.dtype)
    return (q @ k.mT * 0.25 + inverted * torch.finfo(q.dtype).min).softmax(-1) @ v


def one_minus_bools(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return one_minus_half(q, k, v, pad != 0)


def one_minus_filled_half(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    inverted = 1.0 - pad[:, None, None].to(dtype=q.dtype)
    low = torch.finfo(q.dtype).min
    return (q @ k.mT * 0.25 + inverted.masked_fill(inverted.bool(), low)).softmax(-1) @ v


def filled_half(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).masked_fill(~visible(pad), -INF).softmax(-1) @ v


def sdpa_half(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return sdpa(q, k, v, visible(pad))


OF_PADDING = [low_of_fp32, one_minus_half, one_minus_bools, one_minus_filled_half]
HALF = [low_added, low_filled, filled_half, sdpa_half, *OF_PADDING]


@pytest.mark.parametrize("program", HALF, ids=lambda program: program.__name__)
def test_bfloat16(program: Program) -> None:
    mask = assert_rewritten(program, *qkv(), left(), dtype=torch.bfloat16).mask
    assert mask == ("t0[b, kv] != 0" if program in OF_PADDING else PADDED)


@pytest.mark.parametrize("program", [one_minus_half, one_minus_bools, one_minus_filled_half])
def test_bfloat16_where_an_entry_is_padding(program: Program) -> None:
    """All its rows are the mean of the values, and have gradients."""
    pad = (torch.arange(N) < torch.tensor([[N], [0]])).long()
    assert_rewritten(program, *qkv(), pad, dtype=torch.bfloat16)


def test_integers_that_are_no_bits() -> None:
    """Two hides less than nothing: it is a bias like any other."""
    pad = (torch.arange(N) * 7 % 3).repeat(B, 1)
    given = [x.detach() for x in qkv()]
    site = assert_rewritten(one_minus_half, *given, pad, dtype=torch.bfloat16)
    assert site.mask == "t0[b, kv] != 0"
    assert site.score.startswith("score + w0(b, kv)")
    assert_left("numbers as large as 1e30", one_minus_half, *qkv(), pad)


@pytest.mark.parametrize(
    "program", [low_of_fp32, filled_half, low_filled], ids=lambda p: p.__name__
)
def test_float16(program: Program) -> None:
    assert_rewritten(program, *qkv(), left(), dtype=torch.float16)


def test_the_least_float16_where_no_row_is_fully_masked() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.25).masked_fill(~causal(), torch.finfo(q.dtype).min)
        return scores.softmax(-1) @ v

    assert assert_rewritten(program, *qkv(), dtype=torch.float16).mask == CAUSAL


@pytest.mark.parametrize(
    "program", [low_added, one_minus_half, one_minus_bools], ids=lambda p: p.__name__
)
def test_the_least_float16_absorbs_nothing(program: Program) -> None:
    """A sum with it is rounded to multiples of 32, or is minus infinity."""
    given = [x.detach().half() for x in qkv()]
    site = assert_left("adds finfo.min to float16 scores", program, *given, left())
    assert 'float("-inf")' in site.hint
    assert_rewritten(program, *given, right(), dtype=torch.float16, finite_fill="minus_inf")


# What is left, and why ------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [-100.0, -1e4, -1e9])
def test_a_finite_fill_leaves_hidden_keys_some_weight(fill: float) -> None:
    def by_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~causal(), fill).softmax(-1) @ v

    def by_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.where(causal(), q @ k.mT, fill).softmax(-1) @ v

    for program in (by_fill, by_where):
        site = assert_left("finite score", program, *qkv())
        assert ("finite_fill" in site.hint) == (fill <= -1e4)
    if fill <= -1e4:
        assert assert_rewritten(by_fill, *qkv(), finite_fill="minus_inf").mask == CAUSAL


def test_a_bool_mask_is_added() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT + causal()).softmax(-1) @ v

    assert "masked_fill" in assert_left("adds 0 or 1", program, *qkv()).hint


def gpt_neo(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Causality takes the place of scores, padding is added to them."""
    scores = torch.where(causal(), q @ k.mT, LOW)
    return (scores + torch.where(pad[:, None, None].bool(), 0.0, LOW)).softmax(-1) @ v


def test_two_masks_where_no_row_can_be_fully_masked() -> None:
    def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return gpt_neo(q, k, v, torch.ones(B, N, dtype=torch.int64))

    assert assert_rewritten(full, *qkv()).mask == CAUSAL


def test_weights_are_returned() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT).masked_fill(~causal(), LOW).softmax(-1)
        return weights @ v, weights

    assert_left("weights are also returned", program, *qkv())


def test_the_softmax_runs_over_the_queries() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~causal(), LOW).softmax(-2) @ v

    assert_left("over the queries", program, *qkv())


def test_a_mask_that_names_no_pair() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = q @ k.mT
        return (scores * keep).softmax(-1) @ v  # hidden scores become 0, and keep weight

    assert_left("no floating tensor", program, *qkv(), causal().int())

"""What programs add to scores: read as what it is, and equal to what the program computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    tensors,
    visible,
)

sdpa = F.scaled_dot_product_attention


def distance() -> Tensor:
    at = torch.arange(N)
    return at - at[:, None]


# T5 -------------------------------------------------------------------------------------------


def bucket(distance: Tensor, both: bool, buckets: int = 32, furthest: int = 128) -> Tensor:
    """As T5: near distances one by one, others by their logarithm."""
    found = torch.zeros_like(distance)
    if both:
        buckets //= 2
        found = found + (distance > 0).to(torch.long) * buckets
        distance = torch.abs(distance)
    else:
        distance = -torch.min(distance, torch.zeros_like(distance))
    exact = buckets // 2
    far = exact + (
        torch.log(distance.float() / exact) / math.log(furthest / exact) * (buckets - exact)
    ).to(torch.long)
    far = torch.min(far, torch.full_like(far, buckets - 1))
    return found + torch.where(distance < exact, distance, far)


def of_buckets(table: Tensor, distance: Tensor, both: bool = True) -> Tensor:
    """[1, H, Nq, Nkv]."""
    return F.embedding(bucket(distance, both), table).permute(2, 0, 1).unsqueeze(0)


def t5_encoder(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    hidden = torch.where(pad[:, None, None].bool(), 0.0, LOW)
    scores = q @ k.mT + (of_buckets(table, distance()) + hidden)
    return F.softmax(scores.float(), dim=-1).type_as(scores) @ v


def t5_decoder(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    scores = q @ k.mT + of_buckets(table, distance(), both=False)
    return (scores + torch.where(visible(pad), 0.0, LOW)).softmax(-1) @ v


def t5_filled(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    scores = q @ k.mT + of_buckets(table, distance())
    return scores.masked_fill(~visible(pad), torch.finfo(scores.dtype).min).softmax(-1) @ v


def t5_sdpa(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    return sdpa(q, k, v, of_buckets(table, distance()), scale=1.0)


BY_DISTANCE = "score + w0(h, kv + n_q - q - 1), w0 is by h, kv - q"


@pytest.mark.parametrize(
    ("program", "mask"),
    [
        (t5_filled, "kv <= q and t0[b, kv] != 0"),
        (t5_sdpa, "true"),
    ],
    ids=lambda one: getattr(one, "__name__", None),
)
def test_t5(program: Program, mask: str) -> None:
    site = assert_rewritten(program, *qkv(), *tensors((32, H)), left())
    assert (site.score, site.mask) == (BY_DISTANCE, mask)


@pytest.mark.parametrize("program", [t5_encoder, t5_decoder], ids=lambda p: p.__name__)
def test_t5_where_rows_may_be_fully_masked(program: Program) -> None:
    """By adding, in training: pairs are read one by one."""
    site = assert_rewritten(program, *qkv(), *tensors((32, H)), left())
    assert "w0(b, h, q, kv)" in site.score or "w0(0, h, q, kv)" in site.score


def test_t5_for_inference() -> None:
    given = [x.detach() for x in (*qkv(), *tensors((32, H)))]
    with torch.no_grad():
        site = assert_rewritten(t5_decoder, *given, left())
    assert (site.score, site.mask) == (BY_DISTANCE, "kv <= q and t0[b, kv] != 0")


def test_t5_in_bfloat16() -> None:
    site = assert_rewritten(t5_filled, *qkv(), *tensors((32, H)), left(), dtype=torch.bfloat16)
    assert site.score == BY_DISTANCE


def behind_a_cache(q: Tensor, k: Tensor, v: Tensor, table: Tensor, seen: Any) -> Tensor:
    place = torch.arange(q.shape[2])[:, None] + seen
    ahead = torch.arange(k.shape[2])[None] - place
    hidden = torch.where(ahead <= 0, 0.0, LOW)
    return (q @ k.mT + of_buckets(table, ahead, both=False) + hidden).softmax(-1) @ v


@pytest.mark.parametrize("seen", [N - 5, torch.tensor(30)], ids=["number", "tensor"])
def test_t5_behind_a_cache(seen: Any) -> None:
    given = [x.detach() for x in (*qkv(n_q=5), *tensors((32, H)))]
    site = assert_rewritten(behind_a_cache, *given, seen)
    assert site.score == BY_DISTANCE
    assert site.mask == ("kv <= q + t0[]" if isinstance(seen, Tensor) else "kv - q < 36")


def test_layers_share_a_table() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = of_buckets(table, distance()) + torch.where(causal(), 0.0, LOW)
        return (((q @ k.mT + bias).softmax(-1) @ v) @ k.mT + bias).softmax(-1) @ v

    assert assert_rewritten(program, *qkv(), *tensors((32, H))).mask == "kv <= q"


# Tables by index ------------------------------------------------------------------------------


def learned_distances(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """[H, 2 N - 1]."""
    return (q @ k.mT * 0.25 + table[:, distance() + N - 1]).masked_fill(~causal(), LOW).softmax(
        -1
    ) @ v


def clipped_distances(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    index = distance().clamp(-9, 9) + 9
    return sdpa(q, k, v, table[:, index].unsqueeze(0))


def index_of_a_window(height: int, width: int) -> Tensor:
    """As Swin: which of the offsets of two places of a window."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows, columns]).flatten(1)
    offset = (places[:, :, None] - places[:, None]).permute(1, 2, 0).contiguous()
    offset[:, :, 0] += height - 1
    offset[:, :, 1] += width - 1
    offset[:, :, 0] *= 2 * width - 1
    return offset.sum(-1)


def swin(q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor) -> Tensor:
    bias = table[index.view(-1)].view(N, N, -1).permute(2, 0, 1).contiguous()
    return (q @ k.mT * 0.25 + bias.unsqueeze(0)).softmax(-1) @ v


def regions() -> Tensor:
    """[windows, N, N]: -100 between places that were no neighbours, as Swin."""
    region = (torch.arange(2 * N) // 13).view(2, N)
    apart = region[:, None] - region[:, :, None]
    return torch.zeros_like(apart.float()).masked_fill(apart != 0, -100.0)


def swin_shifted(q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor) -> Tensor:
    bias = table[index.view(-1)].view(N, N, -1).permute(2, 0, 1).contiguous()
    scores = q @ k.mT * 0.25 + bias.unsqueeze(0)
    scores = scores.view(B // 2, 2, H, N, N) + regions()[None, :, None]
    return scores.view(-1, H, N, N).softmax(-1) @ v


def beit(q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor) -> Tensor:
    bias = F.embedding(index, table).permute(2, 0, 1)
    return sdpa(q, k, v, attn_mask=bias.expand(B, H, N, N))


OF_PAIRS = "w0 is tensor [1, 4, 40, 40]"


@pytest.mark.parametrize(
    ("program", "shown"),
    [(swin, OF_PAIRS), (swin_shifted, OF_PAIRS), (beit, "w0 is tensor")],
    ids=lambda one: getattr(one, "__name__", None),
)
def test_tables_by_index(program: Program, shown: str) -> None:
    index = index_of_a_window(5, 8)
    site = assert_rewritten(program, *qkv(), *tensors((9 * 15, H)), index)
    assert shown in site.score
    assert site.mask == "true"
    assert ("-100" in site.score) == (program is swin_shifted)


def test_regions_by_masks_are_skipped() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, region: Tensor) -> Tensor:
        apart = region[:, None] != region[:, :, None]
        scores = (q @ k.mT * 0.25).view(1, 2, H, N, N).masked_fill(apart[None, :, None], -INF)
        return scores.view(-1, H, N, N).softmax(-1) @ v

    site = assert_rewritten(program, *qkv(), (torch.arange(2 * N) // 13).view(2, N))
    assert site.mask == "t0[b, kv] == t0[b, q]"


@pytest.mark.parametrize("program", [learned_distances, clipped_distances])
def test_tables_by_distance(program: Program) -> None:
    assert assert_rewritten(program, *qkv(), *tensors((H, 2 * N - 1))).score == BY_DISTANCE


# ALiBi ----------------------------------------------------------------------------------------


def slopes() -> Tensor:
    return 2.0 ** -torch.arange(1, H + 1)[:, None, None]


def alibi_of_distances(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25 - distance().abs() * slopes()
    return scores.masked_fill(~visible(pad), LOW).softmax(-1) @ v


def alibi_of_keys(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25 + slopes() * torch.arange(N)
    return (scores + torch.where(visible(pad), 0.0, LOW)).softmax(-1) @ v


def alibi_in_the_mask(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    hidden = torch.full((N, N), -INF).triu(1)
    return sdpa(q, k, v, attn_mask=(distance() * slopes() + hidden).unsqueeze(0))


def alibi_of_bloom(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Places are counted without padding; products have batch and heads in one."""
    place = ((pad.cumsum(-1) - 1) * pad)[:, None]
    alibi = (slopes().view(H, 1) * place.float()).reshape(B * H, 1, N)
    q, k, v = (x.reshape(B * H, N, D) for x in (q, k, v))
    scores = alibi.baddbmm(batch1=q, batch2=k.mT, beta=1.0, alpha=0.25).view(B, H, N, N)
    weights = F.softmax(scores + torch.where(visible(pad), 0.0, LOW), dim=-1)
    return torch.bmm(weights.view(B * H, N, N), v).view(B, H, N, D)


ALIBI = {
    alibi_of_distances: "score - w0(h, kv + n_q - q - 1), w0 is by h, kv - q",
    alibi_of_keys: "score + w0(h, kv), w0 is by h, kv",
    alibi_in_the_mask: BY_DISTANCE,
    alibi_of_bloom: "score + w0(b, h, kv), w0 is by b, h, kv",
}


@pytest.mark.parametrize("program", ALIBI, ids=lambda program: program.__name__)
def test_alibi(program: Program) -> None:
    site = assert_rewritten(program, *qkv(), left())
    assert site.score == ALIBI[program]
    in_mask = program is alibi_in_the_mask
    assert site.mask == ("kv <= q" if in_mask else "kv <= q and t0[b, kv] != 0")


# Of pairs -------------------------------------------------------------------------------------


def deberta(
    q: Tensor, k: Tensor, v: Tensor, of_keys: Tensor, of_queries: Tensor, pad: Tensor
) -> Tensor:
    """Content to position and position to content, gathered from products with embeddings."""
    q, k, v = (x.reshape(B * H, N, D) for x in (q, k, v))
    of_keys, of_queries = (
        x.view(2 * N, H, D).transpose(0, 1).repeat(B, 1, 1) for x in (of_keys, of_queries)
    )
    scale, away = math.sqrt(3 * D), -distance()
    scores = torch.bmm(q, k.mT / scale)
    there = torch.clamp(away + N, 0, 2 * N - 1).expand(B * H, N, N)
    back = torch.clamp(-away + N, 0, 2 * N - 1).expand(B * H, N, N)
    scores = scores + torch.gather(torch.bmm(q, of_keys.mT), -1, there) / scale
    scores = scores + torch.gather(torch.bmm(k, of_queries.mT), -1, back).mT / scale
    scores = scores.view(B, H, N, N).masked_fill(~pad[:, None, None].bool(), LOW)
    return torch.bmm(scores.softmax(-1).view(B * H, N, N), v).view(B, H, N, D)


def test_deberta() -> None:
    shapes = [(2 * N, H * D)] * 2
    site = assert_rewritten(deberta, *qkv(), *tensors(*shapes), right())
    assert site.score.startswith("score + w0(b, h, q, kv) + w1(b, h, q, kv)")
    assert site.mask == "t0[b, kv] != 0"


def products_of_buckets(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, pad: Tensor) -> Tensor:
    """The logarithm says where a product is looked up, not what it is."""
    there = bucket(distance(), both=True).expand(B, H, N, N)
    scores = q @ k.mT + torch.gather(q @ keys.mT, -1, there)
    return scores.masked_fill(~visible(pad), LOW).softmax(-1) @ v


def test_products_of_buckets_for_inference() -> None:
    assert_rewritten(products_of_buckets, *qkv(), *tensors((32, D)), right())
    given = [x.detach() for x in (*qkv(), *tensors((32, D)))]
    assert_rewritten(products_of_buckets, *given, right())


def logarithms_of_products(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, pad: Tensor) -> Tensor:
    """A logarithm of what is looked up may be as low as a mask."""
    weights = torch.log((q @ keys.mT).relu())
    scores = q @ k.mT + torch.gather(weights, -1, bucket(distance(), both=True).expand(B, H, N, N))
    return scores.masked_fill(~visible(pad), LOW).softmax(-1) @ v


def test_logarithms_of_products_are_left() -> None:
    given = [x.detach() for x in (*qkv(), *tensors((32, D)))]
    assert_left("it adds a bias that may be a mask", logarithms_of_products, *given, right())


def products_with_distances(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """As Shaw: a product of queries and embedded distances."""
    relative = torch.einsum("bhid,ijd->bhij", q, bias[distance() + N - 1])
    return (q @ k.mT * 0.25 + relative).masked_fill(~causal(), -INF).softmax(-1) @ v


def test_products_with_distances() -> None:
    site = assert_rewritten(products_with_distances, *qkv(), *tensors((2 * N - 1, D)))
    assert site.mask == "kv <= q"


@dataclass(frozen=True)
class Dense:
    """A tensor that is added, where it comes to, and what is said of it."""

    shape: tuple[int, ...]
    shown: str
    apply: Callable[[Tensor, Tensor], Tensor] = torch.add


DENSE = {
    "pairs": Dense((N, N), "score + w0(q, kv), w0 is tensor [40, 40]"),
    "heads": Dense((1, H, N, N), "score + w0(0, h, q, kv), w0 is tensor [1, 4, 40, 40]"),
    "batch": Dense((B, 1, N, N), "score + w0(b, 0, q, kv), w0 is tensor [2, 1, 40, 40]"),
    "keys": Dense((B, 1, 1, N), "score + w0(b, kv), w0 is by b, kv"),
    "keys of heads": Dense((H, 1, N), "score + w0(h, kv), w0 is by h, kv"),
    "subtracted": Dense((N, N), "score - w0(q, kv), w0 is tensor [40, 40]", torch.sub),
    "times a number": Dense(
        (N, N),
        "score - 0.5*w0(q, kv), w0 is tensor [40, 40]",
        lambda s, bias: torch.add(s, bias, alpha=-0.5),
    ),
    "before the scale": Dense(
        (N, N), "0.5*score + 0.5*w0(q, kv), w0 is tensor [40, 40]", lambda s, bias: (s + bias) / 2
    ),
    "of other strides": Dense(
        (N, N), "score + w0(q, kv), w0 is tensor [40, 40]", lambda s, bias: s + bias.mT
    ),
    "expanded": Dense(
        (1, H, N, N),
        "score + w0(b, h, q, kv), w0 is tensor [2, 4, 40, 40]",
        lambda s, bias: s + bias.expand(B, H, N, N),
    ),
    "twice": Dense(
        (N, N),
        "score + w0(q, kv) + w1(q, kv), w0 is tensor [40, 40], w1 is tensor [40, 40]",
        lambda s, bias: s + bias + bias.tanh(),
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense(name: str) -> None:
    """With rows that are fully masked, beside it."""
    dense = DENSE[name]

    def program(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pad: Tensor) -> Tensor:
        scores = dense.apply(q @ k.mT * 0.25, bias)
        return scores.masked_fill(~visible(pad), LOW).softmax(-1) @ v

    site = assert_rewritten(program, *qkv(), *tensors(dense.shape), left())
    assert (site.score, site.mask) == (dense.shown, "kv <= q and t0[b, kv] != 0")


def test_dense_in_bfloat16() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + bias).masked_fill(~causal(), -INF).softmax(-1) @ v

    assert_rewritten(program, *qkv(), *tensors((H, N, N)), dtype=torch.bfloat16)


def test_three_and_two_axes() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + bias).masked_fill(~causal(), -INF).softmax(-1) @ v

    for lead in ((B,), ()):
        shapes = [(*lead, N, D)] * 3
        site = assert_rewritten(program, *tensors(*shapes), *tensors((N, N), seed=1))
        assert site.score == "score + w0(q, kv), w0 is tensor [40, 40]"


def test_grouped_heads_and_one_head() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return sdpa(q, k, v, bias[None], enable_gqa=True)

    for heads in (2, 1):
        assert_rewritten(program, *qkv(heads), *tensors((H, N, N), seed=1))


def test_integers_are_added() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, steps: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + steps - distance().abs()).softmax(-1) @ v

    assert_rewritten(program, *qkv(), torch.randint(-3, 4, (N, N)))


@pytest.mark.parametrize("number", [-100.0, -1e4])
def test_finite_numbers_are_added(number: float) -> None:
    """They hide nothing: where others are as low, they take part."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.zeros(N, N).masked_fill(~causal(), number)
        return (q @ k.mT * 0.25 + hidden).softmax(-1) @ v

    site = assert_rewritten(program, *qkv())
    assert site.mask == "true"
    assert f"Piecewise(({number}, kv > q), (0.0, True))" in site.score
    assumed = assert_rewritten(program, *qkv(), finite_fill="minus_inf")
    assert assumed.mask == ("kv <= q" if number == -1e4 else "true")


@pytest.mark.parametrize("hidden", [-INF, LOW])
def test_a_float_mask_of_which_only_a_call_knows_the_numbers(hidden: float) -> None:
    """What a row yields that it hides as a whole depends on them."""

    def for_sdpa(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
        return sdpa(q, k, v, added)

    def written_out(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + added).softmax(-1) @ v

    added = torch.zeros(B, 1, N, N).masked_fill(~visible(right()), hidden)
    for program in (for_sdpa, written_out):
        assert "bool mask" in assert_left("only known at run time", program, *qkv(), added).hint


def test_hidden_by_the_bias_where_no_row_is_fully_masked() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return sdpa(q, k, v, torch.where(causal(), bias, -INF))

    site = assert_rewritten(program, *qkv(), *tensors((1, H, N, N)))
    assert (site.score, site.mask) == (
        "score + w0(0, h, q, kv), w0 is tensor [1, 4, 40, 40]",
        "kv <= q",
    )


# Rows that are fully masked -------------------------------------------------------------------


def added_beside(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pad: Tensor) -> Tensor:
    """Every score is the same, and so is each share of the gradient."""
    return (q @ k.mT * 0.25 + bias + torch.where(visible(pad), 0.0, LOW)).softmax(-1) @ v


def added_within(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pad: Tensor) -> Tensor:
    return sdpa(q, k, v, bias + torch.where(visible(pad), 0.0, LOW))


def chosen_within(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pad: Tensor) -> Tensor:
    """No gradient reaches the bias of hidden pairs."""
    return (q @ k.mT * 0.25 + torch.where(visible(pad), bias, LOW)).softmax(-1) @ v


def filled_within(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pad: Tensor) -> Tensor:
    bias = bias.expand(B, H, N, N).masked_fill(~visible(pad), LOW)
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


def not_at_all(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pad: Tensor) -> Tensor:
    """SDPA's are 0."""
    return sdpa(q, k, v, torch.where(visible(pad), bias, -INF))


def nan(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pad: Tensor) -> Tensor:
    return (q @ k.mT * 0.25 + torch.where(visible(pad), bias, -INF)).softmax(-1) @ v


PADDED = [added_beside, added_within, chosen_within, filled_within, not_at_all, nan]


@pytest.mark.parametrize("program", PADDED, ids=lambda program: program.__name__)
def test_trained_biases_of_padded_rows(program: Program) -> None:
    assert_rewritten(program, *qkv(), *tensors((1, H, N, N)), left())


# What is left, and why ------------------------------------------------------------------------


def talking_heads(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = torch.einsum("bhqk,hg->bgqk", q @ k.mT + bias, torch.eye(H) + 0.1)
    return scores.softmax(-1) @ v


def changed_before_it_is_used(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    weights = (q @ k.mT + bias).softmax(-1)
    bias.mul_(2)
    return weights @ v


def summed_with_another_product(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT + v @ k.mT + bias).softmax(-1) @ v


def scores_added_to_the_bias_in_place(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    total = bias.expand(B, H, N, N).clone()
    total += q @ k.mT
    return total.softmax(-1) @ v


def biased_scores_returned(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    scores = q @ k.mT + bias
    return scores.softmax(-1) @ v, scores


def larger_than_the_scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q[:1] @ k[:1].mT + bias.expand(B, 1, N, N)).softmax(-1) @ v


def added_by_a_number_of_the_call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = torch.baddbmm(bias.expand(B * H, N, N), q.flatten(0, 1), k.flatten(0, 1).mT)
    return (scores.view(B, H, N, N).softmax(1)) @ v


LEFT: dict[Callable[..., Any], str] = {
    talking_heads: "heads are mixed",
    changed_before_it_is_used: "changed in place",
    summed_with_another_product: "sum of two products",
    scores_added_to_the_bias_in_place: "added to the mask in place",
    biased_scores_returned: "scores are also returned",
    larger_than_the_scores: "larger shape",
    added_by_a_number_of_the_call: "over the heads",
}


@pytest.mark.parametrize("program", LEFT, ids=lambda program: program.__name__)
def test_left(program: Program) -> None:
    given = [x.detach() for x in (*qkv(), *tensors((N, N)))]
    assert_left(LEFT[program], program, *given)


def test_changed_in_place_before_it_is_read() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        bias = bias.clone()
        bias[:, :3] = 1.0
        bias.mul_(2)
        return (q @ k.mT + bias).softmax(-1) @ v

    assert_rewritten(program, *qkv(), *tensors((N, N)))


def changed_when_all_is_done(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    bias = bias * 1.0
    out = (q @ k.mT + bias).softmax(-1) @ v
    bias.mul_(2)
    return out + bias.sum()


def test_changed_in_place_when_all_is_done() -> None:
    """What is trained reads it again, which the program does not."""
    given = [*qkv(), *tensors((N, N))]
    assert_left("changed in place afterwards", changed_when_all_is_done, *given)
    with torch.no_grad():
        frozen = [nn.Parameter(x, requires_grad=False) for x in given]
        assert_rewritten(changed_when_all_is_done, *frozen)

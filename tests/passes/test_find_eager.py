"""Attention written out, in every spelling; each site must mean what the program computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from sparse_compile.passes.find import find_attention
from sparse_compile.sites.site import AttentionSite
from tests.passes.capture import capture_one
from tests.passes.site_meaning import compare, rejections

B, H, N, M, D = 2, 4, 6, 7, 8
INF = float("inf")


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def qkv() -> list[Tensor]:
    return tensors((B, H, N, D), (B, H, M, D), (B, H, M, D))


def keep() -> Tensor:
    """A bool mask without an empty row."""
    mask = torch.rand(B, 1, N, M, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True
    return mask


def the_site(fn: Callable[..., Any], *args: Any, **options: Any) -> AttentionSite:
    """The only site of ``fn``, proven to mean what the program computes."""
    captured = capture_one(fn, *args, **options)
    before = str(captured.gm.graph)
    found = find_attention(captured.gm)
    assert rejections(found) == ()
    assert str(captured.gm.graph) == before
    (comparison,) = compare(captured)
    tolerance = 1e-5 if comparison.computed.dtype is torch.float32 else 3e-2
    torch.testing.assert_close(
        comparison.computed.double(), comparison.claimed, rtol=tolerance, atol=tolerance
    )
    return comparison.site


def shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["example_value"].shape)


def assert_plain(site: AttentionSite) -> None:
    assert site.kind == "eager"
    assert [shape(o.node) for o in (site.q, site.k, site.v)] == [
        (B, H, N, D),
        (B, H, M, D),
        (B, H, M, D),
    ]
    assert site.q.axes == site.k.axes == site.v.axes == site.output.axes == ("b", "h", "n", "d")
    assert shape(site.output.node) == (B, H, N, D)
    assert site.score_axes == ("b", "h", "q", "kv")
    assert not site.causal


PRODUCTS = {
    "torch.matmul": lambda q, k: torch.matmul(q, k.transpose(2, 3)),
    "operator": lambda q, k: q @ k.transpose(-2, -1),
    "method": lambda q, k: q.matmul(k.transpose(-1, -2)),
    "mT": lambda q, k: q @ k.mT,
    "permute": lambda q, k: q @ k.permute(0, 1, 3, 2),
    "permute tuple": lambda q, k: q @ torch.permute(k, (0, 1, -1, -2)),
    "swapaxes": lambda q, k: q @ k.swapaxes(2, 3),
    "torch.transpose": lambda q, k: q @ torch.transpose(k, dim0=-1, dim1=-2),
    "movedim": lambda q, k: q @ k.movedim(-1, -2),
    "contiguous": lambda q, k: q @ k.transpose(-2, -1).contiguous(),
    "keywords": lambda q, k: torch.matmul(input=q, other=k.mT),
    "einsum": lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k),
    "einsum letters": lambda q, k: torch.einsum("b h i d, b h j d -> b h i j", q, k),
    "einsum ellipsis": lambda q, k: torch.einsum("...qd,...kd->...qk", q, k),
    "einsum list": lambda q, k: torch.einsum("bhqd,bhkd->bhqk", [q, k]),
    "einsum swapped": lambda q, k: torch.einsum("bhkd,bhqd->bhqk", k, q),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    site = the_site(lambda q, k, v: PRODUCTS[name](q, k).softmax(-1) @ v, *qkv())
    assert_plain(site)
    assert site.scale == 1.0
    assert site.masks == ()


SOFTMAXES = {
    "F": lambda s: F.softmax(s, dim=-1),
    "F positional": lambda s: F.softmax(s, 3),
    "F float32": lambda s: F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype),
    "torch": lambda s: torch.softmax(s, -1),
    "torch float32": lambda s: torch.softmax(s, dim=-1, dtype=torch.float32).type_as(s),
    "method": lambda s: s.softmax(dim=3),
    "module": nn.Softmax(dim=-1),
    "upcast": lambda s: s.float().softmax(-1).to(s.dtype),
    "type": lambda s: s.type(torch.float32).softmax(-1).type(s.dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmaxes(name: str, dtype: torch.dtype) -> None:
    args = [x.to(dtype) for x in qkv()]
    assert_plain(the_site(lambda q, k, v: SOFTMAXES[name](q @ k.mT) @ v, *args))


WEIGHTED = {
    "matmul": lambda w, v: torch.matmul(w, v),
    "dropout eval": lambda w, v: F.dropout(w, 0.1, training=False) @ v,
    "dropout zero": lambda w, v: nn.functional.dropout(w, p=0.0, training=True) @ v,
    "dropout positional": lambda w, v: F.dropout(w, 0.3, False, False) @ v,
    "torch.dropout": lambda w, v: torch.dropout(w, 0.5, False) @ v,
    "contiguous": lambda w, v: w.contiguous().clone() @ v,
    "einsum": lambda w, v: torch.einsum("bhqk,bhkd->bhqd", w, v),
    "einsum names": lambda w, v: torch.einsum("b h i j, b h j d -> b h i d", w, v),
    "einsum swapped": lambda w, v: torch.einsum("...ke,...qk->...qe", v, w),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_products_with_values(name: str) -> None:
    assert_plain(the_site(lambda q, k, v: WEIGHTED[name]((q @ k.mT).softmax(-1), v), *qkv()))


SCALES = {
    "mul": (lambda s: s * 0.3, 0.3),
    "reflected": (lambda s: 0.3 * s, 0.3),
    "div": (lambda s: s / math.sqrt(8), 8**-0.5),
    "torch.mul": (lambda s: torch.mul(s, 0.3), 0.3),
    "torch.div": (lambda s: torch.div(s, 4.0), 0.25),
    "method": (lambda s: s.mul(0.5).div(2), 0.25),
    "product": (lambda s: s * 0.5 / 2.0 * 0.7, 0.175),
    "constant tensor": (lambda s: s * torch.tensor(0.5), 0.5),
    "root of a constant": (lambda s: s / torch.sqrt(torch.tensor(4.0)), 0.5),
    "root of a size": (lambda s: s / math.sqrt(s.shape[-1] + 2), 1 / 3),
    "full": (lambda s: s / torch.full([], 2.0), 0.5),
    "plus nothing": (lambda s: s * 0.5 + 0, 0.5),
    "negative": (lambda s: s * -0.5, -0.5),
}


@pytest.mark.parametrize("name", SCALES)
def test_scales(name: str) -> None:
    scaled, expected = SCALES[name]
    site = the_site(lambda q, k, v: scaled(q @ k.mT).softmax(-1) @ v, *qkv())
    assert_plain(site)
    assert site.scale == pytest.approx(expected)


def test_a_scale_on_q_stays_in_q() -> None:
    site = the_site(lambda q, k, v: ((q * 0.5) @ k.mT).softmax(-1) @ v, *qkv())
    assert site.scale == 1.0
    assert site.q.node.op == "call_function"


def test_a_scale_tensor_is_a_node() -> None:
    site = the_site(lambda q, k, v, s: (q @ k.mT * s).softmax(-1) @ v, *qkv(), torch.tensor(0.3))
    assert isinstance(site.scale, Node)
    assert shape(site.scale) == ()


def test_baddbmm_scales_and_adds() -> None:
    q, k, v, bias = tensors((3, N, D), (3, M, D), (3, M, D), (3, 1, M))

    def added(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return torch.baddbmm(bias, q, k.mT, beta=1, alpha=0.3).softmax(-1).bmm(v)

    def ignored(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        empty = torch.zeros(3, N, M)
        return torch.baddbmm(empty, q, k.mT, beta=0, alpha=0.3).softmax(-1).bmm(v)

    site = the_site(added, q, k, v, bias)
    assert (site.scale, [m.role for m in site.masks]) == (0.3, ["add"])
    assert site.score_axes == ("b", "q", "kv")
    assert site.q.axes == ("b", "n", "d")
    assert the_site(ignored, q, k, v).masks == ()


LOWEST = torch.finfo(torch.float32).min

MASKS = {
    "masked_fill": (lambda s, m: s.masked_fill(~m, -INF), "drop", -INF),
    "masked_fill keywords": (lambda s, m: s.masked_fill(mask=~m, value=-1e9), "drop", -1e9),
    "masked_fill compare": (lambda s, m: s.masked_fill(m == 0, LOWEST), "drop", LOWEST),
    "torch.masked_fill": (lambda s, m: torch.masked_fill(s, ~m, -1e4), "drop", -1e4),
    "masked_fill tensor": (lambda s, m: s.masked_fill(~m, torch.tensor(-9e3)), "drop", -9e3),
    "where": (lambda s, m: torch.where(m, s, -INF), "keep", -INF),
    "where swapped": (lambda s, m: torch.where(~m, -INF, s), "drop", -INF),
    "where method": (lambda s, m: s.where(m, LOWEST), "keep", LOWEST),
    "where full": (
        lambda s, m: torch.where(m, s, torch.full([], LOWEST, dtype=s.dtype)),
        "keep",
        LOWEST,
    ),
    "where cast": (
        lambda s, m: torch.where(m, s.to(s.dtype), torch.tensor(-5.0).to(s.dtype)),
        "keep",
        -5.0,
    ),
    "where full_like": (lambda s, m: torch.where(m, s, torch.full_like(s, -7.0)), "keep", -7.0),
    "masked before a scale": (lambda s, m: s.masked_fill(~m, -INF) * 0.5, "drop", -INF),
    "filled before a scale": (lambda s, m: s.masked_fill(~m, -10.0) / 2, "drop", -5.0),
}


@pytest.mark.parametrize("name", MASKS)
def test_bool_masks(name: str) -> None:
    masked, role, fill = MASKS[name]
    site = the_site(lambda q, k, v, m: masked(q @ k.mT, m).softmax(-1) @ v, *qkv(), keep())
    assert_plain(site)
    (mask,) = site.masks
    assert (mask.role, mask.changed(mask.fill)) == (role, fill)
    assert shape(mask.node) == (B, 1, N, M)


ADDED = {
    "after": lambda s, m: s + m,
    "before": lambda s, m: m + s,
    "torch": lambda s, m: torch.add(s, m),
    "method": lambda s, m: s.add(m),
    "sliced": lambda s, m: s + m[:, :, :, : s.shape[-1]],
}


@pytest.mark.parametrize("name", ADDED)
def test_float_masks(name: str) -> None:
    mask = torch.zeros(B, 1, N, M).masked_fill(~keep(), -INF)
    site = the_site(lambda q, k, v, m: ADDED[name](q @ k.mT * 0.3, m).softmax(-1) @ v, *qkv(), mask)
    assert_plain(site)
    assert site.scale == 0.3
    assert [m.role for m in site.masks] == ["add"]


def test_masks_keep_their_order() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, m: Tensor, bias: Tensor) -> Tensor:
        scores = torch.where(m, q @ k.mT * 0.5, LOWEST) + bias
        return scores.masked_fill(~m, -1e9).softmax(-1) @ v

    site = the_site(f, *qkv(), keep(), torch.randn(N, M))
    assert [(m.role, m.fill) for m in site.masks if m.role != "add"] == [
        ("keep", LOWEST),
        ("drop", -1e9),
    ]
    assert [m.role for m in site.masks] == ["keep", "add", "drop"]


def test_a_fill_may_be_a_tensor_known_at_run_time() -> None:
    site = the_site(
        lambda q, k, v, m, fill: torch.where(m, q @ k.mT, fill).softmax(-1) @ v,
        *qkv(),
        keep(),
        torch.tensor(-50.0),
    )
    assert isinstance(site.masks[0].fill, Node)


def in_place_statements(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = q @ k.mT
    scores *= 0.5
    scores /= 2
    scores.mul_(0.5)
    scores.masked_fill_(~m, -INF)
    return scores.softmax(-1) @ v


def in_place_results(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = (q @ k.mT).div_(8).masked_fill_(~m, -INF)
    return scores.softmax(-1) @ v


def in_place_mixed(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / 8
    scores.masked_fill_(~m, -INF)
    return scores.float().softmax(-1) @ v


@pytest.mark.parametrize("fn", [in_place_statements, in_place_results, in_place_mixed])
def test_in_place_updates_of_the_scores(fn: Callable[..., Tensor]) -> None:
    site = the_site(fn, *qkv(), keep())
    assert_plain(site)
    assert site.scale == pytest.approx(0.125)
    assert [m.role for m in site.masks] == ["drop"]


def test_an_additive_mask_in_place() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = q @ k.mT
        scores += bias
        return scores.softmax(-1) @ v

    assert [m.role for m in the_site(f, *qkv(), torch.randn(N, M)).masks] == ["add"]


def integers_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + torch.ones(N, M).tril().long()).softmax(-1) @ v


def subtracted_with_a_factor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sub(q @ k.mT, torch.arange(M), alpha=0.5).softmax(-1) @ v


def added_then_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT + torch.arange(M)) * 0.5).softmax(-1) @ v


def added_then_curved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh((q @ k.mT + torch.arange(M)) / 5) * 5).softmax(-1) @ v


def temperature_of_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * torch.arange(1.0, H + 1)[:, None, None]).softmax(-1) @ v


def divided_and_curved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (F.silu(q @ k.mT / torch.arange(1.0, M + 1)) + 1.5).square().softmax(-1) @ v


OPERANDS = {
    integers_added: ("score + w0()", ["add"]),
    subtracted_with_a_factor: ("score - 0.5*w0()", ["add"]),
    added_then_scaled: ("0.5*score + 0.5*w0()", ["add"]),
    added_then_curved: ("5*tanh(0.2*score + 0.2*w0())", ["add"]),
    temperature_of_heads: ("score*w0()", ["factor"]),
    divided_and_curved: ("(score/((1 + exp(-score/w0()))*w0()) + 1.5)**2", ["factor"]),
}


@pytest.mark.parametrize("fn", OPERANDS, ids=lambda fn: fn.__name__)
def test_what_scores_become_is_a_program(fn: Callable[..., Tensor]) -> None:
    shown, roles = OPERANDS[fn]
    site = the_site(fn, *qkv())
    assert_plain(site)
    assert (str(site.score), [m.role for m in site.masks]) == (shown, roles)


def test_a_trained_scale_is_an_operand() -> None:
    scale = nn.Parameter(torch.tensor(0.3))
    site = the_site(lambda q, k, v: (q @ k.mT * scale).softmax(-1) @ v, *qkv(), grad=True)
    assert (site.scale, [m.role for m in site.masks]) == (1.0, ["factor"])


def test_a_divisor_known_at_run_time_is_an_operand() -> None:
    site = the_site(lambda q, k, v, s: (q @ k.mT / s).softmax(-1) @ v, *qkv(), torch.tensor(0.3))
    assert (site.scale, [m.role for m in site.masks]) == (1.0, ["factor"])


MAXIMA = {
    "amax": lambda s: s - s.amax(-1, keepdim=True),
    "max": lambda s: s - s.max(dim=-1, keepdim=True).values,
    "first of max": lambda s: s - s.max(-1, True)[0],
    "detached": lambda s: s - s.amax(-1, keepdim=True).detach(),
    "in place": lambda s: s.sub_(s.amax(3, keepdim=True)),
}


@pytest.mark.parametrize("name", MAXIMA)
def test_a_row_minus_its_maximum_is_the_row(name: str) -> None:
    site = the_site(lambda q, k, v: MAXIMA[name](q @ k.mT * 0.3).softmax(-1) @ v, *qkv())
    assert_plain(site)
    assert (site.scale, site.score, site.masks) == (0.3, None, ())


def test_weights_that_are_nan_are_made_zero() -> None:
    hidden = torch.ones(N, M).triu().bool()  # the last keys of every row, all of the first

    def numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(hidden, -INF).softmax(-1).nan_to_num() @ v

    def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(hidden, -INF).softmax(-1).masked_fill(hidden, 0.0) @ v

    assert the_site(numbers, *qkv()).zeroed == "nan"
    assert the_site(filled, *qkv()).zeroed == "hidden"


DROPOUTS = {
    "F": lambda w: F.dropout(w, 0.1),
    "keywords": lambda w: F.dropout(w, p=0.1, training=True),
    "torch": lambda w: torch.dropout(w, 0.1, True),
    "module": nn.Dropout(0.1),
    "never and once": lambda w: F.dropout(F.dropout(w, 0.1), 0.3, training=False),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_of_weights(name: str) -> None:
    captured = capture_one(lambda q, k, v: DROPOUTS[name]((q @ k.mT).softmax(-1)) @ v, *qkv())
    (site,) = find_attention(captured.gm)
    assert isinstance(site, AttentionSite)
    assert_plain(site)
    assert site.dropout == 0.1


EINSUM_AXES = {
    "bqhd,bkhd->bhqk": ("bhqk,bkhd->bqhd", ("b", "n", "h", "d"), ("b", "n", "h", "d")),
    "...qhd,...khd->...hqk": ("...hqk,...khd->...qhd", ("b", "n", "h", "d"), ("b", "n", "h", "d")),
    "bqhd,bkhd -> bhqk": ("bhqk,bkhd->bhqd", ("b", "n", "h", "d"), ("b", "h", "n", "d")),
}


@pytest.mark.parametrize("equation", EINSUM_AXES)
def test_einsum_axes(equation: str) -> None:
    second, in_axes, out_axes = EINSUM_AXES[equation]
    q, k, v = tensors((B, N, H, D), (B, M, H, D), (B, M, H, 5))
    site = the_site(
        lambda q, k, v: torch.einsum(second, torch.einsum(equation, q, k).softmax(-1), v), q, k, v
    )
    assert site.q.axes == site.k.axes == site.v.axes == in_axes
    assert site.output.axes == out_axes


def test_transposed_projections() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        q = x.view(B, N, H, D).transpose(1, 2)
        k = y.view(B, M, H, D).permute(0, 2, 3, 1)
        v = y.view(B, M, H, D).transpose(1, 2)
        return ((q @ k).softmax(-1) @ v).transpose(1, 2).reshape(B, N, H * D)

    site = the_site(f, *tensors((B, N, H * D), (B, M, H * D)))
    assert (shape(site.q.node), site.q.axes) == ((B, H, N, D), ("b", "h", "n", "d"))
    assert (shape(site.k.node), site.k.axes) == ((B, M, H, D), ("b", "n", "h", "d"))


def test_keys_stored_transposed() -> None:
    site = the_site(
        lambda q, k, v: (q @ k).softmax(-1) @ v,
        *tensors((B, H, N, D), (B, H, D, M), (B, H, M, D)),
    )
    assert site.k.axes == ("b", "h", "d", "n")
    square = the_site(lambda q, k, v: (q @ k).softmax(-1) @ v, *tensors(*[(B, H, D, D)] * 3))
    assert square.k.axes == ("b", "h", "d", "n")


def test_three_and_two_axes() -> None:
    three = the_site(
        lambda q, k, v: torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(2), v),
        *tensors((3, N, D), (3, M, D), (3, M, D)),
    )
    two = the_site(lambda q, k, v: (q @ k.t()).softmax(-1) @ v, *tensors((N, D), (M, D), (M, D)))
    assert (three.q.axes, three.score_axes) == (("b", "n", "d"), ("b", "q", "kv"))
    assert (two.k.axes, two.score_axes) == (("n", "d"), ("q", "kv"))


def repeat_kv(x: Tensor, n: int) -> Tensor:
    batch, heads, length, width = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, n, length, width)
    return x.reshape(batch, heads * n, length, width)


def repeat_tokens_first(x: Tensor, n: int) -> Tensor:
    """As repeat_kv on a [B, N, H, D] tensor, then transposed."""
    batch, heads, length, width = x.shape
    x = x.transpose(1, 2)[:, :, :, None, :].expand(batch, length, heads, n, width)
    return x.reshape(batch, length, heads * n, width).transpose(1, 2)


REPEATS = {
    "expand": repeat_kv,
    "interleave": lambda x, n: x.repeat_interleave(n, dim=1),
    "torch interleave": lambda x, n: torch.repeat_interleave(x, repeats=n, dim=-3),
    "flatten": lambda x, n: x.unsqueeze(2).expand(-1, -1, n, -1, -1).flatten(1, 2),
    "repeat": lambda x, n: x.unsqueeze(2).repeat(1, 1, n, 1, 1).view(B, -1, M, D),
    "contiguous": lambda x, n: x[:, :, None].expand(B, 2, n, M, D).contiguous().view(B, -1, M, D),
    "tokens first": repeat_tokens_first,
}


@pytest.mark.parametrize("name", REPEATS)
def test_repeated_heads_are_undone(name: str) -> None:
    q, k, v = tensors((B, H, N, D), (B, 2, M, D), (B, 2, M, D))
    repeat = REPEATS[name]
    site = the_site(lambda q, k, v: (q @ repeat(k, 2).mT).softmax(-1) @ repeat(v, 2), q, k, v)
    assert shape(site.k.node) == shape(site.v.node) == (B, 2, M, D)
    assert site.k.node.op == site.v.node.op == "placeholder"
    assert site.region[-1] is site.output.node
    assert {n.name for n in site.region} >= {site.output.node.name}


def test_tiled_heads_are_not_undone() -> None:
    q, k, v = tensors((B, H, N, D), (B, 2, M, D), (B, 2, M, D))
    site = the_site(
        lambda q, k, v: (q @ k.repeat(1, 2, 1, 1).mT).softmax(-1) @ v.repeat(1, 2, 1, 1), q, k, v
    )
    assert shape(site.k.node) == shape(site.v.node) == (B, H, M, D)


def test_heads_tiled_by_expand_are_not_undone() -> None:
    def tile(x: Tensor) -> Tensor:
        return x[:, None].expand(B, 2, 2, M, D).reshape(B, H, M, D)

    q, k, v = tensors((B, H, N, D), (B, 2, M, D), (B, 2, M, D))
    site = the_site(lambda q, k, v: (q @ tile(k).mT).softmax(-1) @ tile(v), q, k, v)
    assert shape(site.k.node) == shape(site.v.node) == (B, H, M, D)


def test_only_k_repeated_is_not_undone() -> None:
    q, k, v = tensors((B, H, N, D), (B, 2, M, D), (B, H, M, D))
    site = the_site(lambda q, k, v: (q @ repeat_kv(k, 2).mT).softmax(-1) @ v, q, k, v)
    assert shape(site.k.node) == (B, H, M, D)


def test_a_cache_overwritten_after_repeat_is_not_read_again() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, vals = repeat_kv(k, 2), repeat_kv(v, 2)
        k.zero_()
        return (q @ keys.mT).softmax(-1) @ vals

    q, k, v = tensors((B, H, N, D), (B, 2, M, D), (B, 2, M, D))
    site = the_site(f, q, k, v)
    assert shape(site.k.node) == shape(site.v.node) == (B, H, M, D)


def test_repeated_keys_changed_in_place_are_not_undone() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, vals = repeat_kv(k, 2), repeat_kv(v, 2)
        keys[:, 1].mul_(2.0)
        copied = keys.contiguous()
        copied += 1
        return (q @ copied.mT).softmax(-1) @ vals

    site = the_site(f, *tensors((B, H, N, D), (B, 2, M, D), (B, 2, M, D)))
    assert shape(site.k.node) == shape(site.v.node) == (B, H, M, D)


def test_a_key_cache_written_in_place_is_read() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, new: Tensor) -> Tensor:
        k.index_copy_(2, torch.arange(3), new)
        return (q @ repeat_kv(k, 2).mT).softmax(-1) @ repeat_kv(v, 2)

    site = the_site(f, *tensors((B, H, N, D), (B, 2, M, D), (B, 2, M, D), (B, 2, 3, D)))
    assert shape(site.k.node) == (B, 2, M, D)


def test_one_key_head_for_all() -> None:
    q, k, v = tensors((B, H, N, D), (B, 1, M, D), (B, 1, M, D))
    broadcast = the_site(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, q, k, v)
    assert shape(broadcast.k.node) == (B, 1, M, D)
    einsum = the_site(
        lambda q, k, v: torch.einsum(
            "bhqk,bkd->bhqd", torch.einsum("bhqd,bkd->bhqk", q, k).softmax(-1), v
        ),
        *tensors((B, H, N, D), (B, M, D), (B, M, D)),
    )
    assert einsum.k.axes == einsum.v.axes == ("b", "n", "d")


def merged(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """Products on [B*H, N, D], masks on [B, H, N, N]."""
    q, k, v = (x.reshape(B * H, -1, D) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(B, H, N, M) + m
    weights = scores.view(B * H, N, M).softmax(-1)
    return torch.bmm(weights, v).view(B, H, N, D)


def merged_four_dimensional_softmax(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    key = k.transpose(2, 3).reshape(B * H, D, M)
    scores = torch.bmm(q.view(B * H, N, D), key).view(B, H, N, M)
    weights = torch.softmax(scores + m, -1)
    return torch.bmm(weights.view(B * H, N, M), v.view(B * H, M, D)).view(B, H, N, D)


@pytest.mark.parametrize("fn", [merged, merged_four_dimensional_softmax])
def test_merged_heads_are_taken_apart(fn: Callable[..., Tensor]) -> None:
    mask = torch.zeros(B, 1, N, M).masked_fill(~keep(), -INF)
    site = the_site(fn, *qkv(), mask)
    assert_plain(site)
    assert [m.role for m in site.masks] == ["add"]


def test_merged_heads_without_a_mask_are_a_batch() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.reshape(B * H, -1, D) for x in (q, k, v))
        return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)

    site = the_site(f, *qkv())
    assert site.score_axes == ("b", "q", "kv")


def grouped_by_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.view(B, 2, 2, N, D)
    return (grouped @ k[:, :2, None].mT).softmax(-1) @ v[:, :2, None]


def grouped_by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bgrqd,bgkd->bgrqk", q.view(B, 2, 2, N, D), k[:, :2])
    scores = scores + torch.arange(2.0)[:, None, None] * torch.arange(M)
    return torch.einsum("bgrqk,bgkd->bgrqd", scores.softmax(-1), v[:, :2])


def windows_of_images(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of all windows, viewed as images and windows to add the mask."""
    q, k, v = (x.reshape(4, 2, -1, D) for x in (q, k, v))
    scores = (q @ k.mT).view(2, 2, 2, N, M) + torch.arange(2.0).view(2, 1, 1, 1) * torch.arange(M)
    return scores.view(4, 2, N, M).softmax(-1) @ v


FIVE_AXES = {
    grouped_by_view: (("b", "h1", "h2", "q", "kv"), []),
    grouped_by_einsum: (("b", "h1", "h2", "q", "kv"), [("b", "h1", "h2", "q", "kv")]),
    windows_of_images: (("b", "h", "q", "kv"), [("b1", "b2", "h", "q", "kv")]),
}


@pytest.mark.parametrize("fn", FIVE_AXES, ids=lambda fn: fn.__name__)
def test_five_axes(fn: Callable[..., Tensor]) -> None:
    site = the_site(fn, *qkv())
    assert (site.score_axes, [mask.axes for mask in site.masks]) == FIVE_AXES[fn]


def test_operands_of_merged_heads() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Tensor) -> Tensor:
        q, k, v = (x.reshape(B * H, -1, D) for x in (q, k, v))
        scores = torch.baddbmm(bias, q, k.mT, beta=0.5, alpha=0.3).view(B, H, N, M)
        weights = scores.masked_fill(~m, -INF).softmax(-1).view(B * H, N, M)
        return torch.bmm(weights, v).view(B, H, N, D)

    site = the_site(f, *qkv(), torch.randn(B * H, N, M), keep())
    assert_plain(site)
    assert (site.scale, str(site.score)) == (0.3, "score + 0.5*w0()")
    assert [mask.axes for mask in site.masks] == [("bh", "q", "kv"), ("b", "h", "q", "kv")]


def test_autocast_around_and_inside() -> None:
    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (q @ k.mT * 0.5).softmax(-1) @ v

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.5).softmax(-1) @ v

    captured = capture_one(plain, *qkv(), autocast=torch.bfloat16)
    (site,) = find_attention(captured.gm)
    for found in (the_site(inside, *qkv()), site):
        assert isinstance(found, AttentionSite)
        assert found.output.node.meta["example_value"].dtype is torch.bfloat16
        assert found.q.node.meta["example_value"].dtype is torch.float32


def test_upcasts_are_undone_where_the_output_is_narrow() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q.float() @ k.float().mT * 0.3).softmax(-1)
        return weights.to(v.dtype) @ v

    site = the_site(f, *(x.bfloat16() for x in qkv()))
    assert site.q.node.op == site.k.node.op == "placeholder"


def test_training_and_checkpoint() -> None:
    args = [x.requires_grad_() for x in qkv()]

    def f(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        def block(q: Tensor, k: Tensor) -> Tensor:
            return (q @ k.transpose(2, 3)).masked_fill(~m, -INF).softmax(-1) @ v

        return torch.utils.checkpoint.checkpoint(block, q, k, use_reentrant=False) * 2

    site = the_site(f, *args, keep(), grad=True)
    assert_plain(site)
    assert site.scope.parent is not None
    assert site.scope.call is not None
    placeholder = site.q.node
    outer = site.scope.feeds.get(placeholder)
    assert outer is not None
    assert shape(outer) == (B, H, N, D)
    assert outer.graph is site.scope.parent.gm.graph


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.3

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) * self.scale).softmax(-1) @ v


def test_dynamic_shapes() -> None:
    symbolic = the_site(Scaled(), *qkv(), dynamic=True)
    assert isinstance(symbolic.scale, Node)
    root = the_site(
        lambda q, k, v: (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v, *qkv(), dynamic=True
    )
    assert root.scale == pytest.approx(D**-0.5)
    power = the_site(
        lambda q, k, v: (q @ k.mT * q.size(-1) ** -0.5).softmax(-1) @ v, *qkv(), dynamic=True
    )
    assert power.scale == pytest.approx(D**-0.5)
    repeated = the_site(
        lambda q, k, v: (q @ repeat_kv(k, 2).mT).softmax(-1) @ repeat_kv(v, 2),
        *tensors((B, H, N, D), (B, 2, M, D), (B, 2, M, D)),
        dynamic=True,
    )
    assert repeated.k.node.op == "placeholder"


def test_where_names_the_users_lines() -> None:
    site = the_site(Scaled(), *qkv())
    assert site.where[-1].startswith("test_find_eager.py:")
    assert site.where[-1].endswith(" in forward")
    assert len(site.where) <= 3


def test_the_region_is_what_nothing_else_reads() -> None:
    site = the_site(lambda q, k, v: (q @ k.mT * 2.0).softmax(-1) @ v, *qkv())
    assert [n.op for n in site.region].count("placeholder") == 0
    inside = set(site.region)
    assert all(set(n.users) <= inside for n in site.region if n is not site.output.node)
    assert list(site.region) == [n for n in site.scope.gm.graph.nodes if n in inside]
    assert len(site.region) == 5

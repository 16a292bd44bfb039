"""scaled_dot_product_attention in every call form, checked against what the program computes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.utils.checkpoint import checkpoint

from sparse_compile.passes.find import find_attention
from sparse_compile.sites.site import AttentionSite, Rejection
from tests.passes.capture import capture_one
from tests.passes.site_meaning import rejections, sites
from tests.passes.test_find_eager import repeat_kv, shape, tensors, the_site

B, H, N, D = 2, 4, 6, 8
sdpa = F.scaled_dot_product_attention


def qkv(kv_heads: int = H) -> list[Tensor]:
    return tensors((B, H, N, D), (B, kv_heads, N, D), (B, kv_heads, N, D))


def keep(*shape: int) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True
    return mask


CALLS: dict[str, tuple[Any, float, bool]] = {
    "plain": (lambda q, k, v: sdpa(q, k, v), D**-0.5, False),
    "keywords": (
        lambda q, k, v: sdpa(
            query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, scale=0.3, is_causal=True
        ),
        0.3,
        True,
    ),
    "positional": (
        lambda q, k, v: sdpa(q, k, v, None, 0.0, True, scale=0.3, enable_gqa=True),
        0.3,
        True,
    ),
    "mixed": (lambda q, k, v: sdpa(q, k, value=v, is_causal=True), D**-0.5, True),
    "scale None": (lambda q, k, v: sdpa(q, k, v, scale=None), D**-0.5, False),
    "torch._C": (
        lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v),
        D**-0.5,
        False,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_call_forms(name: str) -> None:
    call, scale, causal = CALLS[name]
    site = the_site(call, *qkv())
    assert site.kind == "sdpa"
    assert site.scale == pytest.approx(scale)
    assert site.causal is causal
    assert site.masks == ()
    assert site.q.axes == site.k.axes == site.v.axes == site.output.axes == ("b", "h", "n", "d")
    assert site.score_axes == ("b", "h", "q", "kv")
    assert site.region == (site.output.node,)


@pytest.mark.parametrize("mask_shape", [(N, N), (1, N), (B, 1, N, N), (B, 1, 1, N), (H, N, N)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_broadcast(mask_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mask = keep(*mask_shape)
    if dtype is torch.float32:
        mask = torch.zeros(mask_shape).masked_fill(~mask, -float("inf"))
    site = the_site(lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), *qkv(), mask)
    (operand,) = site.masks
    assert operand.role == ("keep" if dtype is torch.bool else "add")
    assert shape(operand.node) == mask_shape


def test_rows_without_keys_are_zero() -> None:
    mask = keep(N, N)
    mask[2] = False
    the_site(lambda q, k, v, m: sdpa(q, k, v, m), *qkv(), mask)


def test_causal_and_mask_together() -> None:
    site = the_site(
        lambda q, k, v, m: sdpa(q, k, v, attn_mask=m, is_causal=True), *qkv(), keep(N, N)
    )
    assert site.causal
    assert len(site.masks) == 1


def test_causal_with_more_keys_than_queries() -> None:
    args = tensors((B, H, 3, D), (B, H, 7, D), (B, H, 7, D))
    assert the_site(lambda q, k, v: sdpa(q, k, v, is_causal=True), *args).causal


def test_key_heads() -> None:
    grouped = the_site(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), *qkv(2))
    assert shape(grouped.k.node) == (B, 2, N, D)
    broadcast = the_site(lambda q, k, v: sdpa(q, k, v), *qkv(1))
    assert shape(broadcast.k.node) == (B, 1, N, D)
    repeated = the_site(lambda q, k, v: sdpa(q, repeat_kv(k, 2), repeat_kv(v, 2)), *qkv(2))
    assert repeated.k.node.op == repeated.v.node.op == "placeholder"
    assert len(repeated.region) == 7
    twice = the_site(
        lambda q, k, v: sdpa(q, repeat_kv(k, 2), repeat_kv(v, 2), enable_gqa=True),
        *tensors((B, 8, N, D), (B, 2, N, D), (B, 2, N, D)),
    )
    assert twice.k.node.op == "placeholder"


def test_repeated_heads_with_another_reader_stay_out_of_the_region() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys = repeat_kv(k, 2)
        return sdpa(q, keys, repeat_kv(v, 2)), keys

    site = the_site(f, *qkv(2))
    assert site.k.node.op == "placeholder"
    assert len(site.region) == 4


def test_three_and_two_axes() -> None:
    three = the_site(
        lambda q, k, v, m: sdpa(q, k, v, m),
        *tensors((3, N, D), (3, N, D), (3, N, D)),
        keep(3, N, N),
    )
    assert (three.q.axes, three.score_axes) == (("b", "n", "d"), ("b", "q", "kv"))
    two = the_site(lambda q, k, v: sdpa(q, k, v), *tensors((N, D), (N, D), (N, 5)))
    assert (two.q.axes, two.score_axes) == (("n", "d"), ("q", "kv"))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.3

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, scale=self.scale)


def test_dynamic_shapes() -> None:
    known = the_site(lambda q, k, v: sdpa(q, k, v, is_causal=True), *qkv(), dynamic=True)
    assert known.scale == pytest.approx(D**-0.5)
    scaled = the_site(Scaled(), *qkv(), dynamic=True)
    assert isinstance(scaled.scale, Node) or scaled.scale == 0.3
    the_site(
        lambda q, k, v, m: sdpa(q, repeat_kv(k, 2), repeat_kv(v, 2), m),
        *qkv(2),
        keep(B, 1, N, N),
        dynamic=True,
    )


def test_dropout() -> None:
    (site,) = find_attention(capture_one(lambda q, k, v: sdpa(q, k, v, dropout_p=0.1), *qkv()).gm)
    assert isinstance(site, AttentionSite)
    assert site.dropout == 0.1


def test_five_axes() -> None:
    args = tensors(*[(2, 3, 2, N, D)] * 3)
    site = the_site(lambda q, k, v, m: sdpa(q, k, v, m), *args, keep(3, 1, N, N))
    assert site.q.axes == site.output.axes == ("b1", "b2", "h", "n", "d")
    assert site.score_axes == ("b1", "b2", "h", "q", "kv")


def test_autocast_decides_the_dtype_of_the_output() -> None:
    captured = capture_one(lambda q, k, v: sdpa(q, k, v), *qkv(), autocast=torch.bfloat16)
    (site,) = find_attention(captured.gm)
    assert isinstance(site, AttentionSite)
    assert site.q.node.meta["example_value"].dtype is torch.float32
    assert site.output.node.meta["example_value"].dtype is torch.bfloat16


def test_checkpoint_gives_the_scope_of_its_body() -> None:
    mask = keep(N, N)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sdpa(q, k, v, attn_mask=mask) + 1

        return checkpoint(block, q, k, v, use_reentrant=False)

    site = the_site(f, *(x.requires_grad_() for x in qkv()), grad=True)
    outer = site.scope.feeds.get(site.masks[0].node)
    assert outer is not None
    assert shape(outer) == (N, N)
    assert outer.op == "placeholder"


def test_nested_checkpoints() -> None:
    wrap = functools.partial(checkpoint, use_reentrant=False)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return wrap(lambda a, b, c: wrap(sdpa, a, b, c) + a, q, k, v)

    captured = capture_one(f, *(x.requires_grad_() for x in qkv()), grad=True)
    (site,) = find_attention(captured.gm)
    assert isinstance(site, AttentionSite)
    assert site.scope.parent is not None
    assert site.scope.parent.parent is not None
    node, scope = site.k.node, site.scope
    while scope.parent is not None:
        outer = scope.feeds.get(node)
        assert outer is not None
        node, scope = outer, scope.parent
    assert node.name == "l_k_"


def test_a_region_compiled_once_and_called_once_or_twice() -> None:
    region = torch.compiler.nested_compile_region(lambda q, k, v: sdpa(q, k, v))
    once = capture_one(lambda q, k, v: region(q, k, v), *qkv(), grad=True)
    assert len(sites(find_attention(once.gm))) == 1
    twice = capture_one(lambda q, k, v: region(region(q, k, v), k, v), *qkv(), grad=True)
    assert all("called several times" in r.reason for r in rejections(find_attention(twice.gm)))
    assert sites(find_attention(twice.gm)) == ()


REJECTED: dict[str, tuple[Any, list[Tensor], str]] = {
    "six axes": (
        lambda q, k, v: sdpa(q, k, v),
        tensors(*[(2, 1, 2, 2, N, D)] * 3),
        "query has 6 axes",
    ),
    "double": (
        lambda q, k, v: sdpa(q, k, v),
        [x.double() for x in qkv()],
        "float64",
    ),
    "k of another batch size": (
        lambda q, k, v: sdpa(q, k, v),
        tensors((B, H, N, D), (1, H, N, D), (1, H, N, D)),
        "k has batch size 1 and q has 2",
    ),
    "different heads of k and v": (
        lambda q, k, v: sdpa(q, k, v),
        tensors((B, H, N, D), (B, 1, N, D), (B, H, N, D)),
        "k has 1 heads and v has 4",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejections(name: str) -> None:
    fn, args, reason = REJECTED[name]
    (rejection,) = find_attention(capture_one(fn, *args).gm)
    assert isinstance(rejection, Rejection)
    assert reason in rejection.reason
    assert rejection.where[-1].startswith("test_find_sdpa.py:")


def test_attention_inside_vmap_is_rejected() -> None:
    found = find_attention(capture_one(torch.vmap(sdpa), *qkv()).gm)
    assert sites(found) == ()
    assert "vmap" in rejections(found)[0].reason


def test_attention_inside_a_branch_is_rejected() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cond(
            q.sum() > 0, lambda q, k, v: sdpa(q, k, v), lambda q, k, v: q + 0, (q, k, v)
        )

    (rejection,) = find_attention(capture_one(f, *qkv()).gm)
    assert isinstance(rejection, Rejection)
    assert "`cond`" in rejection.reason

"""Attention that is hidden in one call, through torch.compile: equal to eager, and reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import export
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import sparse_compile
from sparse_compile.inspect.explain import explain_with
from tests.backend.test_backend import WINDOW, window_mask
from tests.tolerance import relative_error

N, E, H = 96, 32, 4
SPARSE = {"decide": "sparse"}
HIDDEN = ~window_mask(N, torch.device("cpu"))


class Attention(nn.Module):
    """``nn.MultiheadAttention`` over a window, and a projection beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)
        self.beside = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        return self.beside(x) + self.attention(x, x, x, attn_mask=HIDDEN)[0]


class Layers(nn.Module):
    """Two layers of an encoder over a window."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = (nn.TransformerEncoderLayer(E, H, 48, 0.0, batch_first=True) for _ in range(2))
        self.layers = nn.ModuleList(made)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, src_mask=HIDDEN)
        return x


def train(model: Callable[..., Any], parameters: list[nn.Parameter], x: Tensor) -> list[Tensor]:
    out = model(x)
    return [out, *torch.autograd.grad(out.square().mean(), parameters)]


@pytest.mark.parametrize("module", [Attention, Layers])
def test_modules_that_are_trained(module: type[nn.Module]) -> None:
    model, x = module(), torch.randn(2, N, E)
    compiled = torch.compile(model, backend="sparse_compile", options=SPARSE)
    parameters = list(model.parameters())
    for found, truth in zip(
        train(compiled, parameters, x), train(model, parameters, x), strict=True
    ):
        assert relative_error(found, truth) < 1e-5


@pytest.mark.parametrize("exported", [False, True])
def test_layers_that_are_not(exported: bool) -> None:
    model, x = Layers().eval(), torch.randn(2, N, E)
    with torch.no_grad():
        program = export(model, (x,)).module() if exported else model
        compiled = torch.compile(program, backend="sparse_compile", options=SPARSE)
        assert relative_error(compiled(x), model(x)) < 1e-5
        report = explain_with(SPARSE)(program, x)
    assert [site.rewritten for site in report.sites] == [True, True]
    assert report.sites[0].mask is not None


def test_flex_attention() -> None:
    def keep(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (q - kv < WINDOW)

    mask = create_block_mask(keep, None, None, N, N, device="cpu", BLOCK_SIZE=16)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        capped = flex_attention(q, k, v, lambda s, b, h, i, j: 9 * torch.tanh(s / 9), mask)
        return flex_attention(capped, k, v, block_mask=mask)

    args = torch.randn(3, 2, H, N, 16)
    compiled = torch.compile(run, backend="sparse_compile", options=SPARSE)
    assert relative_error(compiled(*args), run(*args)) < 1e-5
    report = explain_with(SPARSE)(run, *args)
    first, second = report.sites
    assert first.rewritten
    assert second.rewritten
    assert first.score == "9*tanh(score/9)"
    assert first.where.startswith("test_opaque_calls.py:")


def test_sites_are_named_by_the_call() -> None:
    model = Attention()
    report = sparse_compile.explain(model, torch.randn(2, N, E))
    (site,) = report.sites
    assert site.where.startswith("attention, test_opaque_calls.py:")


def test_what_is_left_says_why() -> None:
    class Returned(Attention):
        def forward(self, x: Tensor) -> Any:
            return self.attention(x, x, x)

    (site,) = explain_with(SPARSE)(Returned(), torch.randn(2, N, E)).sites
    assert not site.rewritten
    assert "its attention weights are returned" in site.reason
    assert "need_weights=False" in site.hint

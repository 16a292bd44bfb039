"""One warning of attention that stays dense although its mask is sparse, and of nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import sparse_compile
from sparse_compile.errors import StaysDense
from sparse_compile.options import Options
from sparse_compile.passes import pipeline, stays_dense

N, D = 128, 8
RETURNED = "the attention weights are also returned, so they must exist"


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has just started."""
    torch._dynamo.reset()
    monkeypatch.setattr(stays_dense, "_TOLD", set())


def window(n: int, width: int = 8) -> Tensor:
    i = torch.arange(n)
    return (i[:, None] >= i) & (i[:, None] - i < width)


def tensor(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


def pipeline_of(function: Callable[..., Any], decide: str = "sparse") -> Callable[..., Any]:
    def backend(gm: Any, inputs: Any) -> Any:
        pipeline.run(gm, inputs, Options(decide=decide))
        return gm.forward

    return torch.compile(function, backend=backend)


def warned(function: Callable[..., Any], *args: Any, decide: str = "sparse") -> list[str]:
    """Compile and call; the warnings of this library, and results as eager has them."""

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = pipeline_of(function, decide)(*args)
    torch.testing.assert_close(found, function(*args))
    return [str(one.message) for one in caught if one.category is StaysDense]


def with_weights(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    weights = (x @ x.mT).masked_fill(~keep, float("-inf")).softmax(-1)
    return weights @ x, weights


class Layers(nn.Module):
    """Six layers, some of which return their weights."""

    def __init__(self, *returning: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(i in returning) for i in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        kept = []
        for layer in self.layers:
            x, weights = layer(x, window(x.shape[2]))
            kept += [weights] if layer.returns else []
        return x, kept


class Layer(nn.Module):
    def __init__(self, returns: bool) -> None:
        super().__init__()
        self.returns = returns

    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        return with_weights(x, keep)


def test_weights_that_are_returned_are_the_reason_and_the_rest_is_rewritten() -> None:
    model, x = Layers(1, 4), tensor(1, 2, N, D)
    report = sparse_compile.explain_with({"decide": "sparse"})(model, x)
    assert [site.rewritten for site in report.sites] == [True, False, True, True, False, True]
    for site in report.sites[1::3]:
        assert site.reason == RETURNED
        assert site.hint == "return only the output, or set output_attentions=False"
    (text,) = warned(model, x)
    assert "2 attentions with a sparse mask will be computed densely" in text
    for number in range(6):
        assert (f"layers.{number}, test_stays_dense.py" in text) == (number in (1, 4))
    assert f"because {RETURNED}." in text
    assert "To have it rewritten, return only the output, or set output_attentions=False." in text
    assert "warnings.simplefilter" in text


def test_many_places_that_are_alike_are_counted() -> None:
    (text,) = warned(Layers(*range(6)), tensor(1, 2, N, D))
    assert "6 attentions" in text
    assert text.count("layers.") == 4
    assert "and 2 more like these" in text


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_output_attentions_of_transformers(implementation: str) -> None:
    config = BertConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation="eager",
        output_attentions=implementation == "eager",
    )
    config._attn_implementation = implementation
    model = BertModel(config, add_pooling_layer=False).eval()
    ids = torch.zeros(1, N, dtype=torch.int64)
    padding = (torch.arange(N) < 40)[None].long()
    report = sparse_compile.explain_with({"decide": "sparse"})(model, ids, attention_mask=padding)
    reasons = {site.reason for site in report.sites}
    assert len(report.sites) == 2
    assert (reasons == {RETURNED}) == (implementation == "eager"), reasons


def test_each_place_is_told_of_once_and_new_ones_are_told() -> None:
    x, keep = tensor(1, 2, N, D), window(N)
    assert len(warned(with_weights, x, keep)) == 1
    torch._dynamo.reset()
    assert warned(with_weights, x, keep) == []

    def elsewhere(x: Tensor) -> Tensor:
        keep = window(N)
        return F.scaled_dot_product_attention(x.double(), x.double(), x.double(), attn_mask=keep)

    (text,) = warned(elsewhere, x)
    assert "`double` is float64" in text
    assert "cast q, k and v to float32, float16 or bfloat16" in text


def test_it_can_be_silenced() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", StaysDense)
        with pytest.raises(Exception, match="an attention with a sparse mask"):
            pipeline_of(with_weights)(tensor(1, 2, N, D), window(N))
        stays_dense._TOLD.clear()
        warnings.simplefilter("ignore", StaysDense)
        pipeline_of(with_weights)(tensor(1, 2, N, D), window(N))


def test_a_mask_tensor_of_unknown_values_is_told_of_where_it_hides_blocks() -> None:
    def attend(x: Tensor, added: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=added)

    x = tensor(1, 2, N, D)
    hiding = torch.zeros(N, N).masked_fill(~window(N), torch.finfo(torch.float32).min)
    (text,) = warned(attend, x, hiding)
    assert "44 % of the blocks hold an allowed pair" in text
    assert "its values are only known at run time" in text
    stays_dense._TOLD.clear()
    torch._dynamo.reset()
    assert warned(attend, x, tensor(N, N)) == []


QUIET: dict[str, tuple[Callable[..., Any], str]] = {
    "rewritten": (lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=window(N)), "sparse"),
    "faster as it is": (
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=window(N)),
        "cost",
    ),
    "would be faster as it is": (lambda x: with_weights(x, window(N)), "cost"),
    "causal": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), "sparse"),
    "no mask": (lambda x: (x @ x.mT).softmax(-1), "sparse"),
    "weights of all keys": (lambda x: with_weights(x, torch.ones(N, N).bool()), "sparse"),
    "router": (lambda x: x.softmax(-1), "sparse"),
}


@pytest.mark.parametrize("name", QUIET)
def test_there_is_nothing_to_tell(name: str) -> None:
    function, decide = QUIET[name]
    assert warned(function, tensor(1, 2, N, D), decide=decide) == []


def test_what_would_pay_is_told_of_under_the_cost_model_too() -> None:
    n = 1024
    (text,) = warned(lambda x: with_weights(x, window(n)), tensor(1, 8, n, 16), decide="cost")
    assert RETURNED in text


def test_explain_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", StaysDense)
        sparse_compile.explain(with_weights, tensor(1, 2, N, D), window(N))

"""Unmodified transformers models: one graph, every attention rewritten, results equal to eager."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, MistralConfig, MistralForCausalLM

import sparse_compile
from tests.tolerance import assert_close_as_eager, relative_error

LENGTH, WINDOW = 72, 16


def mistral(implementation: str) -> nn.Module:
    config = MistralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=WINDOW,
        max_position_embeddings=1024,
        attn_implementation=implementation,
        use_cache=False,
    )
    return MistralForCausalLM(config)


def bert(implementation: str) -> nn.Module:
    config = BertConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=1024,
        attn_implementation=implementation,
    )
    return BertModel(config, add_pooling_layer=False)


MODELS: dict[str, Callable[[str], nn.Module]] = {"mistral": mistral, "bert": bert}


def padding_mask(side: str, length: int = LENGTH) -> Tensor | None:
    if side == "none":
        return None
    mask = torch.ones(3, length, dtype=torch.int64)
    for row, padded in enumerate((0, 5, 21)):
        if padded:
            mask[row, :padded] = 0
            if side == "right":
                mask[row] = mask[row].flip(0)
    return mask


def run(model: Callable[..., Any], inputs: dict[str, Any], parameters: nn.Module) -> list[Tensor]:
    """The outputs, then every parameter's gradient, of a loss that reads padded rows too."""
    parameters.zero_grad(set_to_none=True)
    output = model(**inputs)[0]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    (output * weights.to(output.dtype)).sum().backward()
    grads = [p.grad for p in parameters.parameters()]
    return [output.detach(), *(torch.zeros(()) if g is None else g.clone() for g in grads)]


def example(side: str, length: int = LENGTH) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 64, (3, length), generator=generator)
    mask = padding_mask(side, length)
    return {"input_ids": ids, **({} if mask is None else {"attention_mask": mask})}


@pytest.mark.parametrize(
    ("name", "implementation", "padded"),
    [
        ("mistral", "sdpa", True),
        ("mistral", "eager", False),
        ("bert", "sdpa", False),
        pytest.param("bert", "eager", True, marks=pytest.mark.inductor),
    ],
)
def test_model_is_rewritten_and_equal(name: str, implementation: str, padded: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = MODELS[name](implementation)
    sides = ["left", "right"] if padded else ["none"]
    report = sparse_compile.explain(model, **example(sides[0]))
    assert report.graphs == 1
    assert len(report.sites) == 2
    for site in report.sites:
        # SDPA without any mask is PyTorch's own dense kernel already: the one thing not to touch.
        assert site.rewritten or "PyTorch's own kernel already skips" in site.reason, str(report)
        assert site.rewritten or (name, implementation, padded) == ("bert", "sdpa", False)
    exact_model = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="sparse_compile", fullgraph=True)
    for side in sides:
        inputs = example(side)
        truth = run(exact_model, inputs, exact_model)
        eager, ours = run(model, inputs, model), run(compiled, inputs, model)
        compare(model, ours, eager, truth)


def compare(model: nn.Module, ours: list[Tensor], eager: list[Tensor], truth: list[Tensor]) -> None:
    names = ["output", *(name for name, _ in model.named_parameters())]
    for what, mine, theirs, exact in zip(names, ours, eager, truth, strict=True):
        # A gradient that is zero but for rounding (a key bias) has no relative error.
        if exact.norm() > 1e-6 * truth[0].norm():
            assert relative_error(mine, theirs) <= 1e-5, what
            assert_close_as_eager(what, mine, theirs, exact)


@pytest.mark.parametrize(("name", "implementation"), [("mistral", "eager"), ("bert", "sdpa")])
def test_half_precision_model_is_as_exact_as_eager(name: str, implementation: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = MODELS[name](implementation).bfloat16()
    inputs = example("left")
    exact_model = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="sparse_compile", fullgraph=True)
    truth = run(exact_model, inputs, exact_model)
    eager, ours = run(model, inputs, model), run(compiled, inputs, model)
    assert_close_as_eager("output", ours[0], eager[0], truth[0])
    grads = [torch.cat([g.flatten() for g in grads[1:]]) for grads in (ours, eager, truth)]
    assert_close_as_eager("gradients", *grads)

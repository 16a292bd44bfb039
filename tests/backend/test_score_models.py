"""Models whose scores are softcapped, or compete with a sink: rewritten, and equal to eager."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

import sparse_compile
from sparse_compile.inspect.explain import explain_with
from tests.backend.test_backend import window_mask
from tests.backend.test_models import compare, run
from tests.tolerance import assert_close_as_eager, relative_error

WINDOW = 16
SHARED = dict(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=WINDOW,
    max_position_embeddings=512,
    attn_implementation="eager",
    use_cache=False,
    attention_dropout=0.0,
)


def gemma2() -> nn.Module:
    config = Gemma2Config(
        **SHARED, attn_logit_softcapping=50.0, query_pre_attn_scalar=1, final_logit_softcapping=None
    )
    return Gemma2ForCausalLM(config)


def gpt_oss() -> nn.Module:
    # Its grouped products know no fp64, in which the truth is computed.
    moe = dict(num_local_experts=2, num_experts_per_tok=1, experts_implementation="batched_mm")
    config = GptOssConfig(**SHARED, **moe)
    model = GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            nn.init.normal_(parameter)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"gemma2": gemma2, "gpt_oss": gpt_oss}
SHOWN = {"gemma2": "50*tanh(score/50)", "gpt_oss": "and a sink beside the keys"}


def inputs(padding: bool, length: int = 70) -> dict[str, Any]:
    ids = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[1, -21:] = 0  # at the right: every query sees itself or something before it
    return {"input_ids": ids, **({"attention_mask": mask} if padding else {})}


CASES = [("gemma2", False), ("gemma2", True), ("gpt_oss", True)]


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_model_is_rewritten_and_trains_as_eager(name: str, padding: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, given = MODELS[name](), inputs(padding)
    report = sparse_compile.explain(model, **given)
    attentions = [site for site in report.sites if site.mask is not None]
    assert len(attentions) == 2, str(report)
    assert all(site.rewritten and site.score == SHOWN[name] for site in attentions), str(report)
    assert SHOWN[name] in str(report)
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="sparse_compile", fullgraph=True)
    truth = run(exact, given, exact)
    eager, ours = run(model, given, model), run(compiled, given, model)
    names = [what for what, _ in model.named_parameters()]
    sunk = [truth[1 + at].norm() for at, what in enumerate(names) if "sinks" in what]
    assert len(sunk) == (2 if name == "gpt_oss" else 0)
    assert all(norm > 0 for norm in sunk)
    compare(model, ours, eager, truth)


def test_padding_may_be_taken_for_infinite() -> None:
    model, given = gemma2(), inputs(padding=True)
    report = explain_with({"finite_fill": "minus_inf"})(model, **given)
    assert report.rewritten == 2, str(report)
    with torch.no_grad():
        report = sparse_compile.explain(model, **given)
    assert report.rewritten == 2, str(report)


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_model_is_as_exact_as_eager(name: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = MODELS[name]().bfloat16()
    given = inputs(padding=False)
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="sparse_compile", fullgraph=True)
    truth = run(exact, given, exact)
    eager, ours = run(model, given, model), run(compiled, given, model)
    assert_close_as_eager("output", ours[0], eager[0], truth[0])
    grads = [torch.cat([g.flatten() for g in grads[1:]]) for grads in (ours, eager, truth)]
    assert_close_as_eager("gradients", *grads)


def left_padded(n: int) -> Tensor:
    """Additive [2, 1, n, n]: causal; the first queries of one batch entry see nothing."""
    allowed = window_mask(n, torch.device("cpu")).repeat(2, 1, 1, 1)
    allowed[1, :, :, :10] = False
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT / 20) * 5 + left_padded(q.shape[2])
    return scores.softmax(-1) @ v


def capped_and_filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT / 20) * 5
    hidden = left_padded(q.shape[2]) != 0
    return scores.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1) @ v


def capped_and_hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT / 20) * 5
    return scores.masked_fill(left_padded(q.shape[2]) != 0, -math.inf).softmax(-1) @ v


def qkv(heads: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, heads, 60, 16, requires_grad=True) for _ in range(3)]


def gradients(fn: Callable[..., Tensor], args: list[Tensor]) -> list[Tensor]:
    out = fn(*args)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), args)]


PADDED = [capped, capped_and_filled, capped_and_hidden]


@pytest.mark.parametrize("fn", PADDED, ids=lambda f: f.__name__)
def test_rows_without_keys_yield_what_the_program_gives(fn: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    args = qkv()
    (site,) = sparse_compile.explain(fn, *args).sites
    assert site.rewritten, site.reason
    compiled = torch.compile(fn, backend="sparse_compile", fullgraph=True)
    for ours, theirs in zip(gradients(compiled, args), gradients(fn, args), strict=True):
        assert relative_error(ours, theirs) <= 1e-5


def test_rows_without_keys_of_an_added_mask_without_gradients() -> None:
    torch._dynamo.reset()
    args = qkv()
    with torch.no_grad():
        (site,) = sparse_compile.explain(capped, *args).sites
        assert site.rewritten, site.reason
        compiled = torch.compile(capped, backend="sparse_compile", fullgraph=True)
        assert relative_error(compiled(*args), capped(*args)) <= 1e-5


def sunk(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT / 20) * 5 + left_padded(q.shape[2]).to(q.dtype)
    both = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return F.softmax(both, -1)[..., :-1] @ v


def test_a_row_with_a_sink_is_never_empty() -> None:
    """A query without keys gives all its weight to the sink: 0, and no NaN in any gradient."""
    torch._dynamo.reset()
    args = [*qkv(3), torch.randn(3, requires_grad=True)]
    (site,) = sparse_compile.explain(sunk, *args).sites
    assert site.rewritten, site.reason
    assert site.score == "5*tanh(score/5), and a sink beside the keys"
    compiled = torch.compile(sunk, backend="sparse_compile", fullgraph=True)
    ours = gradients(compiled, args)
    exact = [arg.detach().double().requires_grad_() for arg in args]
    for mine, truth in zip(ours, gradients(sunk, exact), strict=True):
        assert relative_error(mine, truth) <= 1e-5
    assert not ours[0][1, :, :10].any()


def test_full_attention_with_a_softcap_or_a_sink_is_not_handed_to_sdpa() -> None:
    torch._dynamo.reset()

    def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        both = torch.cat([torch.tanh(q @ k.mT / 20) * 5, torch.ones(2, 2, 60, 1)], -1)
        return both.softmax(-1)[..., :-1] @ v

    compiled = torch.compile(full, backend="sparse_compile", fullgraph=True)
    for ours, theirs in zip(gradients(compiled, qkv()), gradients(full, qkv()), strict=True):
        assert relative_error(ours, theirs) <= 1e-5

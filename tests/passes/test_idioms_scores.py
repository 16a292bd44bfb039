"""What programs do to scores and weights besides masking: rewritten, and what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
    tensors,
    visible,
)

sdpa = F.scaled_dot_product_attention
Change = Callable[[Tensor], Tensor]


def changed(change: Change) -> Program:
    """Causal attention whose scaled scores are changed before they are masked."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return change(q @ k.mT * 0.25).masked_fill(~causal(), -INF).softmax(-1) @ v

    return program


# Curves and numbers ---------------------------------------------------------------------------

CURVES: dict[str, tuple[Change, str | None]] = {
    "tanh": (torch.tanh, "tanh(score)"),
    "softcap": (lambda s: 5 * torch.tanh(s / 5), "5*tanh(score/5)"),
    "sigmoid": (lambda s: s.sigmoid() * 3, "3/(1 + exp(-score))"),
    "exp": (lambda s: s.exp(), "exp(score)"),
    "silu": (F.silu, "score/(1 + exp(-score))"),
    "silu in place": (lambda s: F.silu(s, inplace=True), "score/(1 + exp(-score))"),
    "relu": (lambda s: F.relu(s), "Max(0, score)"),
    "abs": (torch.abs, None),
    "square": (lambda s: -s.square(), "-score**2"),
    "two": (lambda s: torch.tanh(s.relu_() - 1), "tanh(Max(0, score) - 1)"),
    "number added": (lambda s: s + 3.0, "score + 3"),
    "number subtracted": (lambda s: (2 * s).tanh() - 1, "tanh(score) - 1"),
    "negative": (lambda s: -s, None),
    "negative divisor": (lambda s: s / -0.5, None),
}


@pytest.mark.parametrize("name", CURVES)
def test_curves_and_numbers(name: str) -> None:
    change, shown = CURVES[name]
    site = assert_rewritten(changed(change), *qkv())
    assert site.mask == "kv <= q"
    if name != "abs":
        assert site.score == shown


def test_a_number_that_nothing_follows_is_no_program() -> None:
    site = assert_rewritten(lambda q, k, v: (q @ k.mT * 0.25 + 3).softmax(-1) @ v, *qkv())
    assert site.score is None


@pytest.mark.parametrize("name", ["relu", "abs", "softcap"])
def test_scores_that_are_exactly_zero(name: str) -> None:
    """Where a curve has a kink torch takes a slope, which padded queries meet."""
    q, k, v = qkv()
    with torch.no_grad():
        q[1, :, :7] = 0.0
    assert_rewritten(changed(CURVES[name][0]), q, k, v)


def test_a_curve_in_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert_rewritten(changed(CURVES["softcap"][0]), *qkv(), dtype=dtype)


# Temperatures ---------------------------------------------------------------------------------

TEMPERATURES: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], str]] = {
    "trained scale": ((), torch.mul, "score*w0(), w0 is by nothing"),
    "one element": ((1,), torch.mul, "score*w0(), w0 is by nothing"),
    "heads": ((H, 1, 1), torch.mul, "score*w0(h), w0 is by h"),
    "reflected": ((H, 1, 1), lambda s, t: t * s, "score*w0(h), w0 is by h"),
    "in place": ((H, 1, 1), lambda s, t: s.mul_(t), "score*w0(h), w0 is by h"),
    "divisor": ((H, 1, 1), torch.div, "score/w0(h), w0 is by h"),
    "queries": ((B, 1, N, 1), torch.mul, "score*w0(b, q), w0 is by b, q"),
    "keys": ((N,), torch.mul, "score*w0(kv), w0 is by kv"),
    "pairs": ((N, N), torch.mul, "score*w0(q, kv), w0 is tensor [40, 40]"),
    "clamped": ((H, 1, 1), lambda s, t: s * t.clamp(max=1.5).exp(), "score*w0(h), w0 is by h"),
    "inside a curve": ((H, 1, 1), lambda s, t: (s * t).tanh(), "tanh(score*w0(h)), w0 is by h"),
    "of a curve": ((H, 1, 1), lambda s, t: s.tanh() * t, "w0(h)*tanh(score), w0 is by h"),
}


@pytest.mark.parametrize("name", TEMPERATURES)
def test_temperatures(name: str) -> None:
    """With rows that are fully masked."""
    shape, apply, shown = TEMPERATURES[name]

    def program(q: Tensor, k: Tensor, v: Tensor, t: Tensor, pad: Tensor) -> Tensor:
        scores = apply(q @ k.mT * 0.25, t)
        return scores.masked_fill(~visible(pad), LOW).softmax(-1) @ v

    (t,) = tensors(shape, seed=2)
    with torch.no_grad():
        t.abs_().add_(0.5)
    site = assert_rewritten(program, *qkv(), t, left())
    assert (site.score, site.mask) == (shown, "kv <= q and t0[b, kv] != 0")


def test_swin_v2() -> None:
    """Cosines, a temperature that is clamped, and a bias of a small network."""

    def program(q: Tensor, k: Tensor, v: Tensor, t: Tensor, table: Tensor) -> Tensor:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        scores = scores * torch.clamp(t, max=4.6).exp()
        index = torch.arange(N) - torch.arange(N)[:, None] + N - 1
        return (scores + 16 * torch.sigmoid(table[:, index]).unsqueeze(0)).softmax(-1) @ v

    assert_rewritten(program, *qkv(), *tensors((H, 1, 1), (H, 2 * N - 1), seed=2))


def test_a_scale_known_at_run_time() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        return (q @ k.mT * scale).masked_fill(~causal(), -INF).softmax(-1) @ v

    assert assert_rewritten(program, *qkv(), torch.tensor(0.3)).score is None


def test_masks_by_factors() -> None:
    """As the first GPT-2: hidden scores are made 0, and 1e4 is subtracted."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.tril(torch.ones(N, N))
        return ((q @ k.mT / 4) * keep - 1e4 * (1 - keep)).softmax(-1) @ v

    assert assert_rewritten(program, *qkv()).mask == "true"


# Maxima ---------------------------------------------------------------------------------------

MAXIMA: dict[str, Change] = {
    "amax": lambda s: s - s.amax(-1, keepdim=True),
    "max": lambda s: s - torch.max(s, dim=-1, keepdim=True)[0],
    "detached": lambda s: s - s.max(-1, keepdim=True).values.detach(),
}


@pytest.mark.parametrize("name", MAXIMA)
def test_a_row_less_its_maximum(name: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.25).masked_fill(~visible(pad), LOW)
        return MAXIMA[name](scores).softmax(-1) @ v

    assert assert_rewritten(program, *qkv(), left()).score is None


FLOORS: dict[str, Change] = {
    "torch.max": lambda s: torch.max(s, torch.tensor(LOW)),
    "maximum": lambda s: torch.maximum(s, torch.full((), LOW)),
    "clamp": lambda s: s.clamp(min=LOW),
}


@pytest.mark.parametrize("name", FLOORS)
def test_a_least_score(name: str) -> None:
    """As XGLM and OPT, where every query has a key."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * 0.25 + torch.where(causal(), 0.0, -INF)
        return FLOORS[name](scores).softmax(-1) @ v

    assert assert_rewritten(program, *qkv()).mask == "kv <= q"


@pytest.mark.parametrize("hidden", ["filled", "low", "infinity"])
def test_a_least_score_of_padded_rows(hidden: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        scores, keep = q @ k.mT * 0.25, visible(pad)
        if hidden == "filled":
            scores = scores.masked_fill(~keep, -INF)
        else:
            scores = scores + torch.where(keep, 0.0, LOW if hidden == "low" else -INF)
        return torch.max(scores, torch.tensor(LOW)).softmax(-1) @ v

    assert_rewritten(program, *qkv(), left())


# Sinks ----------------------------------------------------------------------------------------


def with_sinks(change: Change) -> Program:
    def program(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, pad: Tensor) -> Tensor:
        scores = change(q @ k.mT * 0.25) + torch.where(visible(pad), 0.0, LOW)
        columns = sinks.reshape(1, -1, 1, 1).expand(B, -1, N, -1)
        both = torch.cat([scores, columns], dim=-1)
        both = both - both.max(dim=-1, keepdim=True).values
        return both.softmax(-1)[..., :-1] @ v

    return program


SUNK: dict[str, Change] = {
    "plain": lambda s: s,
    "softcap": lambda s: 5 * torch.tanh(s / 5),
    "distances": lambda s: s - 0.1 * (torch.arange(N) - torch.arange(N)[:, None]).abs(),
    "number added": lambda s: s + 3,
}


@pytest.mark.parametrize("name", SUNK)
def test_sinks(name: str) -> None:
    """A row that is fully masked gives all its weight to the sink."""
    site = assert_rewritten(with_sinks(SUNK[name]), *qkv(), *tensors((H,), seed=3), left())
    assert site.score.endswith("and a sink beside the keys")


def beside_a_sink(change: Change) -> Program:
    def program(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        columns = sinks.reshape(1, -1, 1, 1).expand(B, -1, N, -1)
        both = torch.cat([change(q @ k.mT * 0.25), columns], dim=-1)
        return both.softmax(-1)[..., :-1] @ v

    return program


def test_a_number_matters_beside_a_sink() -> None:
    """Softmax ignores it where there is no other column."""
    site = assert_rewritten(beside_a_sink(lambda s: s + 3), *qkv(), *tensors((H,), seed=3))
    assert site.score == "score + 3, and a sink beside the keys"


@pytest.mark.parametrize(
    "program",
    [
        beside_a_sink(MAXIMA["amax"]),
        lambda q, k, v, t: torch.tanh(MAXIMA["amax"](q @ k.mT)).softmax(-1) @ v,
        lambda q, k, v, t: (MAXIMA["amax"](q @ k.mT) * t[:, None, None]).softmax(-1) @ v,
        lambda q, k, v, t: torch.relu(MAXIMA["amax"](q @ k.mT) + 2).softmax(-1) @ v,
    ],
    ids=["sinks", "tanh", "temperature", "relu"],
)
def test_a_maximum_that_matters(program: Program) -> None:
    site = assert_left("something that it matters for", program, *qkv(), *tensors((H,), seed=3))
    assert "leave it out" in site.hint


# Rows that are fully masked, of scores that are not linear ------------------------------------

PADDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softcap": lambda s, t: 5 * torch.tanh(s / 5),
    "softcap of a bias": lambda s, t: 5 * torch.tanh((s + t) / 5),
    "relu": lambda s, t: torch.relu(s + t),
    "temperature": lambda s, t: s * t[0],
    "scale": lambda s, t: s * 2,
}


@pytest.mark.parametrize("name", PADDED)
def test_padded_rows_in_training(name: str) -> None:
    """Hidden scores are absorbed by what is added: all count alike, and have gradients."""

    def program(q: Tensor, k: Tensor, v: Tensor, t: Tensor, pad: Tensor) -> Tensor:
        scores = PADDED[name](q @ k.mT * 0.25, t)
        return (scores + torch.where(visible(pad), 0.0, LOW)).softmax(-1) @ v

    assert_rewritten(program, *qkv(), *tensors((N, N), seed=2), left())


# Weights --------------------------------------------------------------------------------------


def nan_made_zero(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    weights = (q @ k.mT * 0.25).masked_fill(~visible(pad), -INF).softmax(-1)
    return torch.nan_to_num(weights, 0.0) @ v


def nan_made_zero_of_minima(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """There is no NaN to begin with."""
    return (q @ k.mT * 0.25).masked_fill(~visible(pad), LOW).softmax(-1).nan_to_num() @ v


def hidden_weights_filled(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    hidden = ~visible(pad)
    weights = (q @ k.mT * 0.25).masked_fill(hidden, LOW).softmax(-1)
    return weights.masked_fill(hidden, 0.0) @ v


def hidden_weights_filled_of_nan(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    hidden = ~visible(pad)
    weights = (q @ k.mT * 0.25).masked_fill(hidden, -INF).softmax(-1)
    return weights.masked_fill(hidden, 0.0) @ v


WEIGHTS = [
    nan_made_zero,
    nan_made_zero_of_minima,
    hidden_weights_filled,
    hidden_weights_filled_of_nan,
]


@pytest.mark.parametrize("program", WEIGHTS, ids=lambda program: program.__name__)
def test_weights_of_padded_rows(program: Program) -> None:
    assert assert_rewritten(program, *qkv(), left()).mask == "kv <= q and t0[b, kv] != 0"


# Axes -----------------------------------------------------------------------------------------


def grouped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pad: Tensor) -> Tensor:
    """Heads in groups, without a repeat of the keys."""
    scores = torch.einsum("bgrqd,bgkd->bgrqk", q.view(B, 2, 2, N, D), k) * 0.25 + bias
    scores = scores.masked_fill(~visible(pad)[:, :, None], LOW)
    return torch.einsum("bgrqk,bgkd->bgrqd", scores.softmax(-1), v).reshape(B, H, N, D)


def grouped_by_matmul(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pad: Tensor) -> Tensor:
    scores = q.view(B, 2, 2, N, D) @ k.unsqueeze(2).mT * 0.25 + bias
    scores = scores.masked_fill(~visible(pad)[:, :, None], LOW)
    return (scores.softmax(-1) @ v.unsqueeze(2)).reshape(B, H, N, D)


@pytest.mark.parametrize("program", [grouped, grouped_by_matmul], ids=lambda p: p.__name__)
def test_grouped_heads(program: Program) -> None:
    site = assert_rewritten(program, *qkv(2), *tensors((2, 1, 1, N), seed=1), left())
    assert site.mask == "kv <= q and t0[b, kv] != 0"


def test_a_bias_of_grouped_heads() -> None:
    site = assert_rewritten(grouped, *qkv(2), *tensors((2, 2, N, N), seed=1), left())
    assert site.score.startswith("score + w0(FloorDiv(h, 2), FloorMod(h, 2), q, kv)")


def windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Products are of all windows, the bias is of the windows of an image."""
    scores = (q @ k.mT * 0.25).view(2, 3, H, N, N) + bias[None, :, None]
    return scores.view(6, H, N, N).softmax(-1) @ v


def test_windows_of_images() -> None:
    site = assert_rewritten(windows, *tensors(*[(6, H, N, D)] * 3), *tensors((3, N, N), seed=1))
    assert site.score.startswith("score + w0(0, FloorMod(b, 3), 0, q, kv)")


@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_of_five_axes(masked: bool) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return sdpa(q, k, v, bias > 0 if masked else bias)

    shapes = [(2, 3, 2, N, D)] * 3
    (bias,) = tensors((3, 1, N, N), seed=1, grad=not masked)
    site = assert_rewritten(program, *tensors(*shapes), bias)
    assert site.mask == ("tensor [6, 1, 40, 40]" if masked else "true")


def merged(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pad: Tensor) -> Tensor:
    """Batch and heads are one axis, and so they are of the bias."""
    q, k, v = (x.reshape(B * H, N, D) for x in (q, k, v))
    scores = torch.baddbmm(bias, q, k.mT, beta=0.5, alpha=0.25).view(B, H, N, N)
    weights = scores.masked_fill(~visible(pad), LOW).softmax(-1).view(B * H, N, N)
    return torch.bmm(weights, v).view(B, H, N, D)


@pytest.mark.parametrize("shape", [(B * H, N, N), (B * H, 1, N), (1, N, N)], ids=str)
def test_merged_batches_and_heads(shape: tuple[int, ...]) -> None:
    site = assert_rewritten(merged, *qkv(), *tensors(shape, seed=1), left())
    assert site.score.startswith("score + 0.5*w0(")
    assert site.mask == "kv <= q and t0[b, kv] != 0"


# What is left, and why ------------------------------------------------------------------------


def filled_then_curved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tanh((q @ k.mT).masked_fill(~causal(), -INF)).softmax(-1) @ v


def added_then_curved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(q @ k.mT + torch.where(causal(), 0.0, -INF)).softmax(-1) @ v


def masked_then_multiplied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~causal(), -INF)
    return (scores * torch.ones(H, 1, 1)).softmax(-1) @ v


def masked_then_negated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-(q @ k.mT).masked_fill(~causal(), INF)).softmax(-1) @ v


def raised_to_more_than_the_least(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).clamp(min=-50.0).softmax(-1) @ v


def another_curve(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.gelu(q @ k.mT).softmax(-1) @ v


def weights_of_another_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).masked_fill(~causal(), LOW).softmax(-1)
    return weights.masked_fill(torch.arange(N) > 30, 0.0) @ v


def weights_of_one_of_two_masks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ahead, far = ~causal(), torch.arange(N) > 30
    weights = (q @ k.mT).masked_fill(ahead, LOW).masked_fill(far, LOW).softmax(-1)
    return weights.masked_fill(ahead, 0.0) @ v


def nan_made_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nan_to_num((q @ k.mT).softmax(-1), 0.5) @ v


def renormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1) * causal()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def key_heads_inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The key head is the inner of two axes: no repeat of heads is that."""
    scores = torch.einsum("brgqd,bgkd->brgqk", q.view(B, 2, 2, N, D), k[:, :2])
    return torch.einsum("brgqk,bgkd->brgqd", scores.softmax(-1), v[:, :2])


LEFT: dict[Callable[..., Any], str] = {
    filled_then_curved: "masked before the tanh",
    added_then_curved: "masked before a curve",
    masked_then_multiplied: "or they were masked",
    masked_then_negated: "masked before they are scaled",
    raised_to_more_than_the_least: "`clamp` changes the scores",
    another_curve: "`gelu` changes the scores",
    weights_of_another_mask: "`masked_fill` changes the attention weights",
    weights_of_one_of_two_masks: "`masked_fill` changes the attention weights",
    nan_made_a_number: "`nan_to_num` changes the attention weights",
    renormalised: "`mul` changes the attention weights",
    key_heads_inside: "batch size",
}


@pytest.mark.parametrize("program", LEFT, ids=lambda program: program.__name__)
def test_left(program: Program) -> None:
    assert_left(LEFT[program], program, *(x.detach() for x in qkv()))


def test_nan_made_zero_where_the_gradient_is_not() -> None:
    """Adding -inf sends the gradient of NaN to scores; filling with it does not."""

    def program(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        scores = q @ k.mT * 0.25 + torch.where(visible(pad), 0.0, -INF)
        return torch.nan_to_num(scores.softmax(-1)) @ v

    assert "masked_fill" in assert_left("gradient is NaN", program, *qkv(), left()).hint
    with torch.no_grad():
        assert_rewritten(program, *(x.detach() for x in qkv()), left())

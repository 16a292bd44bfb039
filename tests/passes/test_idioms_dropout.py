"""Dropout of attention weights: the same law as the program's, and gradients of what was dropped.

Which weights a call keeps is read off its output: with queries of zeros all weights are above zero,
and with an identity for values they are the output. Under the same seed another call keeps the
same, so a dense program that is told what to keep says what output and gradients must be.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_compile.expr import Dropout, ScoreData, grid, keeps
from sparse_compile.passes.find import find_attention
from sparse_compile.sites.site import Rejection
from tests.passes.capture import capture_one
from tests.passes.idioms import (
    INF,
    LOW,
    B,
    Compiled,
    D,
    H,
    N,
    Program,
    assert_left,
    in_dtype,
    left,
    outcome,
    qkv,
    right,
    tensors,
    visible,
)
from tests.tolerance import assert_close_as_eager, relative_error

sdpa = F.scaled_dot_product_attention
Dropping = Callable[[Tensor], Tensor]

P = 0.3


def values() -> Tensor:
    return tensors((B, H, N, N), seed=5)[0]


def seeded(program: Program, args: Sequence[Any], seed: int = 3) -> list[Tensor | None]:
    torch.manual_seed(seed)
    return outcome(program, args)


def drop(weights: Tensor) -> Tensor:
    return F.dropout(weights, P, training=True)


# Programs, and what they drop with ------------------------------------------------------------


def written_out(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, drop: Dropping = drop) -> Tensor:
    scores = (q @ k.mT * 0.25).masked_fill(~pad[:, None, None].bool(), -INF)
    return drop(scores.softmax(-1)) @ v


def in_full_precision(
    q: Tensor, k: Tensor, v: Tensor, pad: Tensor, drop: Dropping = drop
) -> Tensor:
    scores = q @ k.mT * 0.25 + torch.where(pad[:, None, None].bool(), 0.0, -INF)
    return drop(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)) @ v


def padded(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, drop: Dropping = drop) -> Tensor:
    """Rows that are fully masked are the mean of the values, of those that stay."""
    return drop((q @ k.mT * 0.25).masked_fill(~visible(pad), LOW).softmax(-1)) @ v


def padded_by_adding(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, drop: Dropping = drop) -> Tensor:
    return drop((q @ k.mT * 0.25 + torch.where(visible(pad), 0.0, LOW)).softmax(-1)) @ v


def made_zero(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, drop: Dropping = drop) -> Tensor:
    weights = (q @ k.mT * 0.25).masked_fill(~visible(pad), -INF).softmax(-1)
    return drop(torch.nan_to_num(weights)) @ v


def made_zero_later(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, drop: Dropping = drop) -> Tensor:
    hidden = ~visible(pad)
    weights = drop((q @ k.mT * 0.25).masked_fill(hidden, LOW).softmax(-1))
    return weights.masked_fill(hidden, 0.0) @ v


def softcapped(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, drop: Dropping = drop) -> Tensor:
    scores = 5 * torch.tanh(q @ k.mT * 0.05)
    return drop(scores.masked_fill(~visible(pad), -INF).softmax(-1)) @ v


def by_distance(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, drop: Dropping = drop) -> Tensor:
    away = (torch.arange(N) - torch.arange(N)[:, None]).abs()
    return drop((q @ k.mT * 0.25 - 0.1 * away).masked_fill(~visible(pad), -INF).softmax(-1)) @ v


def merged(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, drop: Dropping = drop) -> Tensor:
    q, k, v = (x.reshape(B * H, N, -1) for x in (q, k, v))
    scores = torch.bmm(q, k.mT).view(B, H, N, N).masked_fill(~visible(pad), -INF)
    return torch.bmm(drop(scores.softmax(-1)).view(B * H, N, N), v).view(B, H, N, -1)


def with_sinks(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, drop: Dropping = drop) -> Tensor:
    scores = (q @ k.mT * 0.25).masked_fill(~visible(pad), -INF)
    both = torch.cat([scores, torch.ones(B, H, N, 1)], -1)
    return drop(both.softmax(-1)[..., :-1]) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, drop: Dropping = drop) -> Tensor:
    k, v = (x[:, :2].repeat_interleave(2, dim=1) for x in (k, v))
    return drop((q @ k.mT * 0.25).masked_fill(~visible(pad), -INF).softmax(-1)) @ v


#: And the padding that they get.
PROGRAMS = {
    **dict.fromkeys([written_out, in_full_precision, softcapped, by_distance, merged], right),
    **dict.fromkeys([padded, padded_by_adding, made_zero, made_zero_later, with_sinks], left),
    grouped: right,
}


def operands(pad: Tensor) -> list[Tensor]:
    return [*qkv()[:2], values(), pad]


def kept(seed: int = 3) -> Tensor:
    """Which weights the first attention of a graph keeps, where nothing else draws before."""
    torch.manual_seed(seed)
    drawn = torch.randint(0, 2**31 - 1, (2,))
    sizes = {"b": range(B), "h": range(H), "q": range(N), "kv": range(N)}
    return keeps(Dropout(P), drawn, ScoreData(grid(torch.device("cpu"), **sizes)))


def read_off(fast: Compiled, seed: int = 3) -> Tensor:
    """Which weights a call keeps under a seed, bool [B, H, N, N]."""
    q, k = (torch.zeros(B, H, N, D, requires_grad=True) for _ in range(2))
    v = torch.eye(N).repeat(B, H, 1, 1).requires_grad_()
    torch.manual_seed(seed)
    return fast(q, k, v, torch.ones(B, N, dtype=torch.int64)).detach() != 0


def told(kept: Tensor) -> Dropping:
    return lambda weights: weights * kept / (1 - P)


def assert_rewritten(fast: Compiled) -> None:
    """And by kernels of ours: SDPA drops by itself."""
    assert fast.sites
    for site in fast.sites:
        assert (site.rewritten, site.executor) == (True, "cpu"), site


def assert_same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    for number, (value, truth) in enumerate(zip(ours, theirs, strict=True)):
        assert value is not None
        assert truth is not None
        error = relative_error(value, truth)
        assert error <= 1e-5, f"{number}: {error:.2e}"


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_output_and_gradients_are_those_of_what_is_kept(program: Program) -> None:
    fast, given = Compiled(lambda *args: program(*args)), operands(PROGRAMS[program]())
    ours = seeded(fast, given)
    assert_rewritten(fast)
    assert_same(ours, outcome(lambda *args: program(*args, drop=told(kept())), given))


def sdpa_masked(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=visible(pad), dropout_p=P)


def sdpa_grouped(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return sdpa(q, k[:, :2], v[:, :2], visible(pad), P, enable_gqa=True)


@pytest.mark.parametrize("program", [sdpa_masked, sdpa_grouped], ids=lambda p: p.__name__)
def test_sdpa(program: Program) -> None:
    """Whose rows without keys are 0."""

    def dense(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        if program is sdpa_grouped:
            k, v = (x[:, :2].repeat_interleave(2, dim=1) for x in (k, v))
        return made_zero(q, k, v, pad, drop=told(kept()))

    fast, given = Compiled(program), operands(left())
    ours = seeded(fast, given)
    assert_rewritten(fast)
    assert_same(ours, outcome(dense, given))


# Draws ----------------------------------------------------------------------------------------


def test_calls_differ_and_a_seed_repeats_them() -> None:
    fast, given = Compiled(lambda *args: written_out(*args)), operands(right())
    first, again = (seeded(fast, given) for _ in range(2))
    other = seeded(fast, given, seed=4)
    following = outcome(fast, given)
    assert_rewritten(fast)
    for one, same, new, another in zip(first, again, other, following, strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, new)
        assert not torch.equal(new, another)


def test_layers_drop_different_weights() -> None:
    fast = Compiled(lambda *args: torch.stack([written_out(*args), written_out(*args)]))
    one, other = read_off(fast)
    assert_rewritten(fast)
    assert torch.equal(one, kept())
    both = float((one & other).double().mean())
    assert abs(both - (1 - P) ** 2) < 0.02


def test_what_is_drawn_elsewhere_is_not_disturbed() -> None:
    """Dropout of something else is the program's own."""

    def program(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return drop(q + 1).sum() * 0 + written_out(q, k, v, pad)

    fast = Compiled(program)
    found = read_off(fast)
    assert_rewritten(fast)
    assert not torch.equal(found, kept())
    assert abs(float(found.double().mean()) - (1 - P)) < 0.02


@functools.cache
def many(p: float) -> Tensor:
    """Which of some 100 000 weights are kept."""

    def program(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return F.dropout((q @ k.mT).masked_fill(pad == 0, -INF).softmax(-1), p) @ v

    fast = Compiled(program)
    batch, heads, length = 4, 6, 64
    q, k = (torch.zeros(batch, heads, length, 8) for _ in range(2))
    v = torch.eye(length).repeat(batch, heads, 1, 1)
    torch.manual_seed(5)
    weights = fast(q, k, v, torch.ones(batch, 1, 1, length, dtype=torch.int64))
    assert_rewritten(fast)
    found = weights != 0
    torch.testing.assert_close(weights[found], torch.full_like(weights[found], 1 / 64 / (1 - p)))
    return found.double()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_each_weight_is_kept_with_the_same_probability(p: float) -> None:
    """Within three standard deviations; of the lines of an axis none is far away, either."""
    found, sigma = many(p), (p * (1 - p)) ** 0.5
    assert abs(found.mean() - (1 - p)) < 3 * sigma / found.numel() ** 0.5
    for axis in range(4):
        means = found.mean([other for other in range(4) if other != axis])
        n = found.numel() / found.shape[axis]
        assert (means - (1 - p)).abs().max() < 4 * sigma / n**0.5


def test_weights_are_kept_independently_of_each_other() -> None:
    """Neighbours along every axis, and pairs that swap query and key."""
    found = 2 * many(0.5) - 1
    bound = 4 / found.numel() ** 0.5
    for axes in ((0,), (1,), (2,), (3,), (2, 3), (0, 1), (1, 3)):
        for distance in (1, 2, 16):
            if all(distance < found.shape[axis] for axis in axes):
                moved = found.roll([distance] * len(axes), axes)
                assert abs((found * moved).mean()) < bound, (axes, distance)
    across = found.tril(-1) * found.mT
    assert abs(across.sum() / (across != 0).sum()) < 4 / (across != 0).sum() ** 0.5


# Probabilities --------------------------------------------------------------------------------


def test_nothing_is_drawn_where_nothing_is_dropped() -> None:
    def never(weights: Tensor) -> Tensor:
        return F.dropout(F.dropout(weights, 0.0, training=True), P, training=False)

    fast, given = Compiled(lambda *args: written_out(*args, drop=never)), operands(right())
    state = torch.get_rng_state()
    ours = outcome(fast, given)
    assert torch.equal(torch.get_rng_state(), state)
    assert_rewritten(fast)
    assert_same(ours, outcome(lambda *args: written_out(*args, drop=never), given))


@pytest.mark.parametrize("call", ["written out", "sdpa"])
def test_all_is_dropped(call: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        if call == "sdpa":
            return sdpa(q, k, v, visible(pad), dropout_p=1.0)
        return written_out(q, k, v, pad, drop=lambda weights: F.dropout(weights, 1.0))

    fast = Compiled(program)
    for value in outcome(fast, operands(right())):
        assert torch.equal(value, torch.zeros_like(value))
    assert_rewritten(fast)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(P)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return written_out(q, k, v, pad, drop=self.dropout)


def test_a_module_drops_in_training_only() -> None:
    block, given = Block(), operands(right())
    fast = Compiled(block)
    dropped = seeded(fast, given)
    assert_rewritten(fast)
    assert_same(dropped, outcome(lambda *args: written_out(*args, drop=told(kept())), given))
    block.eval()
    fast = Compiled(block)
    assert_same(outcome(fast, given), outcome(block, given))
    assert_rewritten(fast)


def test_without_gradients() -> None:
    fast, given = Compiled(lambda *args: written_out(*args)), operands(right())
    given = [x.detach() for x in given]
    ours = seeded(fast, given)
    assert_rewritten(fast)
    assert_same(ours, [written_out(*given, drop=told(kept()))])


def test_bfloat16() -> None:
    fast = Compiled(lambda *args: written_out(*args))
    given = in_dtype(operands(right()), torch.bfloat16)
    ours = seeded(fast, given)
    assert_rewritten(fast)

    def dense(*args: Tensor) -> Tensor:
        return written_out(*args, drop=told(kept()))

    eager, exact = outcome(dense, given), outcome(dense, in_dtype(given, torch.float64))
    for number, (value, own, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        assert_close_as_eager(str(number), value, own.to(value.dtype), truth)


def test_a_length_known_at_run_time() -> None:
    """Which pair is kept depends on where it is, not on how many there are."""
    fast, length = Compiled(lambda *args: written_out(*args), dynamic=True), 27
    given = [x.detach()[:, :, :length].requires_grad_() for x in operands(right())[:3]]
    given.append(right()[:, :length])
    ours, there = seeded(fast, given), told(kept()[:, :, :length, :length])
    assert_rewritten(fast)
    assert_same(ours, outcome(lambda *args: written_out(*args, drop=there), given))


# Recomputed -----------------------------------------------------------------------------------


def checkpointed(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, drop: Dropping = drop) -> Tensor:
    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return written_out(q, k, v, pad, drop).square()

    made: Tensor = checkpoint(block, q, k, v, use_reentrant=False)
    return made


@pytest.mark.parametrize("how", ["as it is", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_a_checkpoint_drops_the_same_again(how: str) -> None:
    """Inductor draws numbers of its own, so what is kept is read off."""
    fast, given = Compiled(lambda *args: checkpointed(*args)), operands(right())
    found = read_off(fast)
    assert not torch.equal(found, read_off(fast, seed=4))
    assert abs(float(found.double().mean()) - (1 - P)) < 0.02
    ours = seeded(fast, given)
    assert_rewritten(fast)
    assert_same(ours, outcome(lambda *args: checkpointed(*args, drop=told(found)), given))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms() -> None:
    """Biases, whose gradients are sums, have the same bits each time, too."""

    def program(
        q: Tensor, k: Tensor, v: Tensor, pad: Tensor, table: Tensor, drop: Dropping = drop
    ) -> Tensor:
        index = torch.arange(N) - torch.arange(N)[:, None] + N - 1
        scores = (q @ k.mT * 0.25 + table[:, index]).masked_fill(~visible(pad), -INF)
        return drop(scores.softmax(-1)) @ v

    given = [*operands(right()), *tensors((H, 2 * N - 1), seed=1)]
    with deterministic():
        fast = Compiled(lambda *args: program(*args))
        first, again = (seeded(fast, given) for _ in range(2))
    assert_rewritten(fast)
    for one, same in zip(first, again, strict=True):
        assert torch.equal(one, same)
    assert_same(first, outcome(lambda *args: program(*args, drop=told(kept())), given))


# What is left, and why ------------------------------------------------------------------------


def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(F.dropout((q @ k.mT).softmax(-1), 0.1), 0.2) @ v


def of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(q @ k.mT, 0.1).softmax(-1) @ v


def of_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout2d((q @ k.mT).softmax(-1), 0.1) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).softmax(-1), 0.1, True, True) @ v


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * (torch.rand(N, N) > 0.1)) @ v


def dropped_weights_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = F.dropout((q @ k.mT).softmax(-1), 0.1)
    return weights @ v, weights


LEFT: dict[Callable[..., Any], str] = {
    twice: "twice",
    of_scores: "dropped before the softmax",
    of_heads: "`dropout2d` changes the attention weights",
    in_place: "in place after the softmax",
    by_hand: "`mul` changes the attention weights",
    dropped_weights_returned: "weights are also returned",
}


@pytest.mark.parametrize("program", LEFT, ids=lambda program: program.__name__)
def test_left(program: Program) -> None:
    assert_left(LEFT[program], program, *qkv())


def test_a_probability_of_the_call() -> None:
    """Computed of a Python float that torch.compile does not make a constant."""

    def program(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        return F.dropout((q @ k.mT).softmax(-1), p * 0.5) @ v

    (found,) = find_attention(capture_one(program, *qkv(), 0.25, dynamic=True).gm)
    assert isinstance(found, Rejection)
    assert "run-time probability" in found.reason

"""Queries that see no key, in programs that mask more than once: they attend to what is hidden.

To what is hidden least: by one mask rather than by two, whose minima add up to minus infinity; and
by the higher one of two numbers. The other keys have no weight then.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_compile.expr import Dropout, ScoreData, grid, keeps
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
    assert_rewritten,
    causal,
    left,
    outcome,
    qkv,
    tensors,
    visible,
)
from tests.tolerance import relative_error

#: The least number of bf16, which is above that of fp32.
LOW_BF16 = torch.finfo(torch.bfloat16).min


def close() -> Tensor:
    """Which keys are fewer than 5 before a query, bool [N, N]."""
    away = torch.arange(N)[:, None] - torch.arange(N)
    return (away >= 0) & (away < 5)


def minima(keep: Tensor, fill: float = LOW) -> Tensor:
    return torch.where(keep, 0.0, fill)


def padding(pad: Tensor, fill: float = LOW) -> Tensor:
    return minima(pad[:, None, None].bool(), fill)


# Two masks ------------------------------------------------------------------------------------


def gpt_neo(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """The window takes the place of scores; causality and padding are added to them."""
    scores = torch.where(close(), q @ k.mT, torch.tensor(LOW))
    return (scores + minima(visible(pad))).softmax(-1) @ v


def filled_and_added(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return ((q @ k.mT).masked_fill(~causal(), LOW) + padding(pad)).softmax(-1) @ v


def added_and_filled(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Both masks leave what the second one says."""
    return (q @ k.mT + padding(pad)).masked_fill(~causal(), LOW).softmax(-1) @ v


def added_twice(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return (q @ k.mT + minima(causal()) + padding(pad)).softmax(-1) @ v


def summed(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """One tensor with minima, and minus infinity where both masks hide."""
    return (q @ k.mT * 0.25 + (minima(causal()) + padding(pad))).softmax(-1) @ v


def summed_and_raised(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """As OPT did: scores that tie with the floor share the gradient with it, lower ones have none.

    The rows are the mean of all values.
    """
    scores = q @ k.mT * 0.25 + (minima(causal()) + padding(pad))
    return torch.max(scores, torch.tensor(LOW)).softmax(-1) @ v


def infinite_and_added(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return ((q @ k.mT).masked_fill(~causal(), -INF) + padding(pad)).softmax(-1) @ v


def subtracted(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return (q @ k.mT - minima(causal(), -LOW) + padding(pad)).softmax(-1) @ v


def added_before_a_scale(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """The sum of both overflows before it is halved."""
    return ((q @ k.mT + minima(causal()) + padding(pad)) / 2).softmax(-1) @ v


def added_around_a_scale(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """The sum of both does not overflow, and is lower than either: half of a minimum is higher."""
    return ((q @ k.mT + minima(causal())) / 2 + padding(pad, LOW / 2)).softmax(-1) @ v


def of_two_numbers(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Padding is hidden less than what is out of the window: queries attend to padding alone."""
    scores = torch.where(close(), q @ k.mT, LOW)
    return (scores + minima(visible(pad), LOW_BF16)).softmax(-1) @ v


def windows_by_head(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Which queries are without keys depends on the head."""
    away = torch.arange(N)[:, None] - torch.arange(N)
    near = away < torch.tensor([3, 5, 9, 40])[:, None, None]
    scores = torch.where(near & (away >= 0), q @ k.mT, LOW)
    return (scores + padding(pad)).softmax(-1) @ v


def merged(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """As Bloom did."""
    q, k, v = (x.reshape(B * H, N, D) for x in (q, k, v))
    scores = torch.bmm(q, k.mT).view(B, H, N, N) * 0.25
    scores = torch.where(causal(), scores, LOW) + padding(pad)
    return torch.bmm(scores.softmax(-1).view(B * H, N, N), v).view(B, H, N, D)


def softcapped(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = 5 * torch.tanh(q @ k.mT * 0.05)
    return (torch.where(causal(), scores, LOW) + padding(pad)).softmax(-1) @ v


CAUSAL = "kv <= q and t0[b, kv] != 0"
WINDOW = "kv <= q and q - kv < 5 and t0[b, kv] != 0"
MASKS: dict[Program, str] = {
    gpt_neo: WINDOW,
    of_two_numbers: WINDOW,
    windows_by_head: "kv <= q and t0[b, kv] != 0 and (q - kv < 9 or h != 2)",
    **dict.fromkeys(
        [
            *(filled_and_added, added_and_filled, added_twice, summed, summed_and_raised),
            *(infinite_and_added, subtracted, added_before_a_scale, added_around_a_scale),
            *(merged, softcapped),
        ],
        CAUSAL,
    ),
}


@pytest.mark.parametrize("program", MASKS, ids=lambda program: program.__name__)
def test_two_masks(program: Program) -> None:
    mask = assert_rewritten(program, *qkv(), left()).mask
    assert mask == MASKS[program] or program is windows_by_head


def test_without_gradients() -> None:
    given = [x.detach() for x in qkv()]
    for program in (gpt_neo, of_two_numbers, summed_and_raised):
        assert_rewritten(program, *given, left())


def test_grouped_heads() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        return gpt_neo(q, k, v, pad)

    assert_rewritten(program, *qkv(heads=2), left())


def test_a_length_that_changes() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        low = torch.finfo(q.dtype).min
        scores = torch.where(at <= at[:, None], q @ k.mT, low)
        return (scores + torch.where(pad[:, None, None].bool(), 0.0, low)).softmax(-1) @ v

    assert assert_rewritten(program, *qkv(), left(), dynamic=True).mask == CAUSAL


def test_in_a_checkpoint() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        out: Tensor = checkpoint(gpt_neo, q, k, v, pad, use_reentrant=False)
        return out

    assert assert_rewritten(program, *qkv(), left()).mask == WINDOW


def test_weights_made_zero_beside_others() -> None:
    """Of one mask, in one graph: only those that are NaN become 0."""

    def program(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        hidden = ~visible(pad)
        scores = (q @ k.mT).masked_fill(hidden, -INF)
        zero = scores.softmax(-1).nan_to_num() @ v
        plain = (q @ k.mT).masked_fill(hidden, -INF).softmax(-1) @ v
        late = torch.arange(N)[:, None] > 20
        return torch.where(late, plain, zero)

    assert_rewritten(program, *[x.detach() for x in qkv()], left())


class Neo(nn.Module):
    """GPT-Neo: the window is a buffer, of which a call reads a part."""

    def __init__(self) -> None:
        super().__init__()
        keep = torch.ones(64, 64, dtype=torch.bool).tril()
        keep = torch.bitwise_xor(keep, keep.tril(-5)).view(1, 1, 64, 64)
        self.register_buffer("bias", keep, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        hidden = torch.finfo(q.dtype).min
        kept = visible(pad)
        added = torch.zeros(B, 1, N, N, dtype=q.dtype).masked_fill(~kept, hidden)
        scores = torch.matmul(q.float(), k.float().mT)
        low = torch.tensor(torch.finfo(scores.dtype).min, dtype=scores.dtype)
        scores = torch.where(self.bias[:, :, :N, :N], scores, low) + added
        return scores.softmax(-1).to(v.dtype) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_in_a_buffer(dtype: torch.dtype) -> None:
    """In bf16 the window hides more than the padding; in fp32 as much."""
    site = assert_rewritten(Neo(), *qkv(), left(), dtype=dtype)
    assert site.mask == f"{CAUSAL} and tensor [1, 1, 40, 40]"


def test_a_buffer_that_changes_before_the_rows_are_attended_to() -> None:
    class Written(Neo):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
            scores = torch.where(self.bias[:, :, :N, :N], q @ k.mT, LOW) + padding(pad)
            weights = scores.softmax(-1)
            self.bias.logical_not_()
            return weights @ v

    site = assert_left("changed in place before they are attended to", Written(), *qkv(), left())
    assert "after the attention" in site.hint


# Rows of which nothing is left ----------------------------------------------------------------


def apart(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """All keys are hidden twice from some queries of an entry that is padding: they are NaN."""
    late = torch.arange(N)[:, None] >= 30
    return (torch.where(~late, q @ k.mT, LOW) + padding(pad)).softmax(-1) @ v


def test_rows_of_which_nothing_is_left() -> None:
    """NaN, and so are the gradients of what they are made of."""
    pad = (torch.arange(N) < torch.tensor([[N], [0]])).long()
    assert_equal_with_nan(apart, *qkv(), pad)


def assert_equal_with_nan(program: Program, *given: Tensor) -> None:
    """That it is rewritten, with NaN where eager has it."""
    fast = Compiled(program)
    for ours, truth in zip(outcome(fast, given), outcome(program, given), strict=True):
        assert ours is not None
        assert truth is not None
        assert torch.equal(ours.isnan(), truth.isnan())
        assert relative_error(ours.nan_to_num(), truth.nan_to_num()) <= 1e-5
    assert all(site.rewritten for site in fast.sites)


def test_infinity_that_is_added_and_that_is_filled_in() -> None:
    """Which gradients are NaN would depend on the row."""

    def program(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return (q @ k.mT + minima(causal(), -INF)).masked_fill(
            ~pad[:, None, None].bool(), -INF
        ).softmax(-1) @ v

    assert_left("masks several times, in different ways", program, *qkv(), left())


# The maximum of a row that is masked as a whole -----------------------------------------------


def less_maximum(scores: Tensor) -> Tensor:
    return scores - scores.amax(-1, keepdim=True)


def raised(scores: Tensor) -> Tensor:
    return torch.max(scores, torch.tensor(LOW))


def hidden(pad: Tensor, number: float = LOW) -> Tensor:
    return torch.where(visible(pad), 0.0, number)


#: Such a row is 0 then, which no floor raises, or NaN.
CENTRED: dict[str, Program] = {
    "filled": lambda q, k, v, pad: (
        raised(less_maximum((q @ k.mT).masked_fill(~visible(pad), LOW))).softmax(-1) @ v
    ),
    "added": lambda q, k, v, pad: raised(less_maximum(q @ k.mT + hidden(pad))).softmax(-1) @ v,
    "added, clamped": lambda q, k, v, pad: (
        less_maximum(q @ k.mT + hidden(pad)).clamp(min=LOW).softmax(-1) @ v
    ),
    "infinity": lambda q, k, v, pad: (
        raised(less_maximum((q @ k.mT).masked_fill(~visible(pad), -INF))).softmax(-1) @ v
    ),
    "infinity, clamped": lambda q, k, v, pad: (
        less_maximum((q @ k.mT).masked_fill(~visible(pad), -INF)).clamp(min=LOW).softmax(-1) @ v
    ),
    "infinity, added": lambda q, k, v, pad: (
        raised(less_maximum(q @ k.mT + hidden(pad, -INF))).softmax(-1) @ v
    ),
    "infinity, added and clamped": lambda q, k, v, pad: (
        less_maximum(q @ k.mT + hidden(pad, -INF)).clamp(min=LOW).softmax(-1) @ v
    ),
    "infinity twice": lambda q, k, v, pad: (
        raised(
            less_maximum((q @ k.mT).masked_fill(~causal(), -INF).masked_fill(~padded(pad), -INF))
        ).softmax(-1)
        @ v
    ),
    "nothing follows": lambda q, k, v, pad: (
        less_maximum(torch.where(close(), q @ k.mT, LOW) + padding(pad)).softmax(-1) @ v
    ),
}


def padded(pad: Tensor) -> Tensor:
    return pad[:, None, None].bool()


@pytest.mark.parametrize("name", CENTRED)
def test_a_maximum_before_a_floor(name: str) -> None:
    assert_equal_with_nan(CENTRED[name], *qkv(), left())


def test_a_maximum_before_a_rounding_that_overflows() -> None:
    """The least number of fp32 is minus infinity in bf16, where the maximum is still in it."""

    def program(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        scores = less_maximum((q @ k.mT).masked_fill(~visible(pad), LOW)).bfloat16()
        return scores.softmax(-1, dtype=torch.float32) @ v

    q, k, v = (x.detach() for x in qkv())
    fast = Compiled(program)
    (ours,) = outcome(fast, [q, k, v, left()])
    assert ours is not None
    assert all(site.rewritten for site in fast.sites)
    assert relative_error(ours[1, :, :7], v[1].mean(-2, keepdim=True).expand(-1, 7, -1)) <= 1e-6


#: What the maximum is depends on the row, and so does what comes of the rest.
UNKNOWN: dict[str, Program] = {
    "two numbers": lambda q, k, v, pad: (
        raised(
            less_maximum(torch.where(close(), q @ k.mT, -INF).masked_fill(~padded(pad), LOW))
        ).softmax(-1)
        @ v
    ),
    "a mask": lambda q, k, v, pad: (
        (less_maximum(torch.where(close(), q @ k.mT, LOW)) + padding(pad)).softmax(-1) @ v
    ),
    "a bias": lambda q, k, v, pad: (
        (less_maximum((q @ k.mT).masked_fill(~visible(pad), LOW)) - torch.arange(N) / 8).softmax(-1)
        @ v
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_maximum_between(name: str) -> None:
    site = assert_left("maximum of the scores is subtracted", UNKNOWN[name], *qkv(), left())
    assert "leave it out" in site.hint


# Biases that are trained ----------------------------------------------------------------------


def bias_then_fill(q: Tensor, k: Tensor, v: Tensor, b: Tensor, pad: Tensor) -> Tensor:
    return (q @ k.mT + b).masked_fill(~visible(pad), LOW).softmax(-1) @ v


def fill_then_bias(q: Tensor, k: Tensor, v: Tensor, b: Tensor, pad: Tensor) -> Tensor:
    """The minimum absorbs the bias, which gets a gradient all the same."""
    return ((q @ k.mT).masked_fill(~visible(pad), LOW) + b).softmax(-1) @ v


def fill_then_half_a_bias(q: Tensor, k: Tensor, v: Tensor, b: Tensor, pad: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~visible(pad), LOW) + b
    return (scores / 2).softmax(-1) @ v


def bias_between(q: Tensor, k: Tensor, v: Tensor, b: Tensor, pad: Tensor) -> Tensor:
    return (torch.where(causal(), q @ k.mT, LOW) + b + padding(pad)).softmax(-1) @ v


BIASED = [bias_then_fill, fill_then_bias, fill_then_half_a_bias, bias_between]


@pytest.mark.parametrize("program", BIASED, ids=lambda program: program.__name__)
def test_trained_biases(program: Program) -> None:
    assert_rewritten(program, *qkv(), *tensors((H, N, N), seed=2), left())


# Dropout --------------------------------------------------------------------------------------

P = 0.3


def kept(seed: int) -> Tensor:
    """Which weights the first attention of a graph keeps."""
    torch.manual_seed(seed)
    drawn = torch.randint(0, 2**31 - 1, (2,))
    sizes = {"b": range(B), "h": range(H), "q": range(N), "kv": range(N)}
    return keeps(Dropout(P), drawn, ScoreData(grid(torch.device("cpu"), **sizes)))


def neo_scores(scores: Tensor, pad: Tensor) -> Tensor:
    return torch.where(close(), scores, LOW) + minima(visible(pad))


DROPPED = {
    "filled": lambda s, pad: s.masked_fill(~visible(pad), LOW),
    "added": lambda s, pad: s + minima(visible(pad)),
    "twice": neo_scores,
}


@pytest.mark.parametrize("name", DROPPED)
def test_weights_of_empty_rows_are_dropped(name: str) -> None:
    masked, given = DROPPED[name], [*qkv(), left()]

    def program(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return F.dropout(masked(q @ k.mT * 0.25, pad).softmax(-1), P) @ v

    def told(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return (masked(q @ k.mT * 0.25, pad).softmax(-1) * kept(3) / (1 - P)) @ v

    fast = Compiled(program)
    torch.manual_seed(3)
    ours = outcome(fast, given)
    for value, truth in zip(ours, outcome(told, given), strict=True):
        assert value is not None
        assert truth is not None
        assert relative_error(value, truth) <= 1e-5
    assert all(site.rewritten for site in fast.sites)

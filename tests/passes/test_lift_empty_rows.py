"""What fully masked rows yield: the policy must give what the program itself gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_compile import reference
from sparse_compile.sites.site import LiftedMask
from sparse_compile.spec import EmptyRows
from tests.passes.lifting import attend, eager, lifted, refused

INF = float("-inf")
N = 8

Form = Callable[[Tensor, Tensor], Tensor]


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x, and padding on the left: with causality the first rows of entry 0 are empty."""
    pad = torch.arange(N) >= torch.tensor([[3], [0]])
    return torch.randn(2, 2, N, 4, generator=torch.Generator().manual_seed(0)).to(dtype), pad


def keep(pad: Tensor) -> Tensor:
    i = torch.arange(N)
    return (i[None] <= i[:, None]) & pad[:, None, None, :]


def low(x: Tensor) -> float:
    return torch.finfo(x.dtype).min


def added(fill: float | None) -> Form:
    def form(x: Tensor, pad: Tensor) -> Tensor:
        value = low(x) if fill is None else fill
        bias = torch.where(keep(pad), 0.0, value).to(x.dtype)
        return eager(x, lambda s: s + bias)

    return form


def filled(fill: float | None) -> Form:
    return lambda x, pad: eager(
        x, lambda s: s.masked_fill(~keep(pad), low(x) if fill is None else fill)
    )


def through_where(fill: float | None) -> Form:
    return lambda x, pad: eager(
        x, lambda s: torch.where(keep(pad), s, low(x) if fill is None else fill)
    )


def sdpa_bool(x: Tensor, pad: Tensor) -> Tensor:
    return attend(x, keep(pad), scale=0.5)


def sdpa_added(fill: float | None) -> Form:
    return lambda x, pad: attend(
        x, torch.where(keep(pad), 0.0, low(x) if fill is None else fill).to(x.dtype), scale=0.5
    )


def twice_filled(x: Tensor, pad: Tensor) -> Tensor:
    i = torch.arange(N)

    def masked(scores: Tensor) -> Tensor:
        causal = scores.masked_fill(i[None] > i[:, None], low(x))
        return causal.masked_fill(~pad[:, None, None], low(x))

    return eager(x, masked)


def overflowing(x: Tensor, pad: Tensor) -> Tensor:
    """A sum of two finfo.min masks: -inf where both mask, made in the mask itself."""
    i = torch.arange(N)
    one = torch.where(i[None] > i[:, None], low(x), 0.0)
    return eager(x, lambda s: s + (one + one))


POLICIES: list[tuple[Form, EmptyRows]] = [
    (sdpa_bool, EmptyRows.ZERO),
    (sdpa_added(INF), EmptyRows.ZERO),
    (sdpa_added(None), EmptyRows.MEAN_ADDED),
    (added(INF), EmptyRows.NAN_ADDED),
    (added(None), EmptyRows.MEAN_ADDED),
    (filled(INF), EmptyRows.NAN),
    (filled(None), EmptyRows.MEAN),
    (through_where(INF), EmptyRows.NAN),
    (through_where(None), EmptyRows.MEAN),
    (twice_filled, EmptyRows.MEAN),
]


@pytest.mark.parametrize("form,policy", POLICIES)
def test_policy_gives_what_the_program_gives(form: Form, policy: EmptyRows) -> None:
    x, pad = data()
    assert lifted(form, x, pad).empty_rows is policy
    q = x.clone().requires_grad_()
    expected = form(q, pad)
    p = x.clone().requires_grad_()
    actual, _ = reference.attention(p, p, p, keep(pad), 0.5, policy.value)
    torch.testing.assert_close(actual.float(), expected, equal_nan=True)
    if policy not in (EmptyRows.NAN, EmptyRows.NAN_ADDED):
        # SDPA's fused backward on the CPU rounds these rows' log-sum-exp away; the plain one is
        # what the program means.
        with sdpa_kernel(SDPBackend.MATH):
            (of_program,) = torch.autograd.grad(form(q, pad).square().sum(), q)
        (of_policy,) = torch.autograd.grad(actual.square().sum(), p)
        torch.testing.assert_close(of_policy.float(), of_program, rtol=1e-4, atol=1e-5)


def test_adding_and_filling_minus_infinity_is_refused() -> None:
    def both(x: Tensor, pad: Tensor) -> Tensor:
        i = torch.arange(N)
        causal = torch.where(i[None] > i[:, None], INF, 0.0)
        return eager(x, lambda s: (s + causal).masked_fill(~pad[:, None, None], INF))

    x, pad = data()
    assert "different ways" in refused(both, x.requires_grad_(), pad).reason
    with torch.no_grad():
        assert lifted(both, x, pad).empty_rows is EmptyRows.NAN


@pytest.mark.parametrize("form", [form for form, _ in POLICIES])
def test_no_row_is_empty_without_padding(form: Form) -> None:
    x, _ = data()
    found = lifted(lambda x: form(x, torch.ones(2, N, dtype=torch.bool)), x)
    assert found.empty_rows is EmptyRows.ZERO
    assert str(found.mask) == "kv <= q"


def test_bfloat16_minimum_absorbs() -> None:
    assert lifted(added(None), *data(torch.bfloat16)).empty_rows is EmptyRows.MEAN_ADDED
    assert lifted(filled(None), *data(torch.bfloat16)).empty_rows is EmptyRows.MEAN


def test_float32_minimum_in_bfloat16_is_minus_infinity() -> None:
    form = added(torch.finfo(torch.float32).min)
    assert lifted(form, *data(torch.bfloat16)).empty_rows is EmptyRows.NAN_ADDED


def test_float16_minimum_does_not_absorb() -> None:
    x, pad = data(torch.float16)
    found = refused(added(None), x, pad)
    assert "float16" in found.reason
    assert "-inf" in found.hint
    full = torch.ones(2, N, dtype=torch.bool)
    assert lifted(lambda x: added(None)(x, torch.ones(2, N).bool()), x).empty_rows is EmptyRows.ZERO
    assert lifted(added(None), x, full, finite_fill="minus_inf").empty_rows is EmptyRows.ZERO


def test_scores_upcast_before_the_mask() -> None:
    def run(x: Tensor, pad: Tensor) -> Tensor:
        scores = ((x @ x.transpose(-1, -2)) * 0.5).float()
        weights = F.softmax(scores.masked_fill(~keep(pad), torch.finfo(torch.float32).min), -1)
        return weights.to(x.dtype) @ x

    # In float32 this is finfo.min although the model is in bfloat16, where it would be -inf.
    assert lifted(run, *data(torch.bfloat16)).empty_rows is EmptyRows.MEAN


@pytest.mark.parametrize("fill", [-100.0, -1e4, -1e9])
def test_finite_fills_leave_some_weight(fill: float) -> None:
    for form in (filled(fill), through_where(fill)):
        found = refused(form, *data())
        assert "finite score" in found.reason
        if fill == -100.0:
            assert "finite_fill" not in found.hint
            assert "finite score" in refused(form, *data(), finite_fill="minus_inf").reason
        else:
            assert "finite_fill" in found.hint
            assert_assumed(lifted(form, *data(), finite_fill="minus_inf"))


@pytest.mark.parametrize("fill", [-100.0, -1e4, -1e9])
def test_finite_numbers_that_are_added_are_a_bias(fill: float) -> None:
    for form in (added(fill), sdpa_added(fill)):
        found = lifted(form, *data())
        assert (str(found.mask), found.empty_rows) == ("True", EmptyRows.ZERO)
        assert found.score is not None
        assert found.learned is not None
        if fill <= -1e4:
            assert_assumed(lifted(form, *data(), finite_fill="minus_inf"))
        else:
            assert lifted(form, *data(), finite_fill="minus_inf").score == found.score


def assert_assumed(found: LiftedMask) -> None:
    """As if -inf were meant."""
    assert found.empty_rows is EmptyRows.ZERO
    assert str(found.mask) == "(kv <= q) & Ne(t0(b, kv), 0)"
    assert found.score is None


def test_two_added_minima_overflow_where_both_mask() -> None:
    def both(x: Tensor, pad: Tensor) -> Tensor:
        i = torch.arange(N)
        causal = torch.where(i[None] <= i[:, None], 0.0, low(x))
        padding = torch.where(pad[:, None, None], 0.0, low(x))
        return eager(x, lambda s: s + causal + padding)

    x, pad = data()
    (once,) = lifted(both, x, pad).fallbacks
    assert str(once.mask) == "(kv <= q) | Ne(t0(b, kv), 0)"
    assert once.empty_rows is EmptyRows.ZERO  # each query sees the first key, or hides it once
    found = lifted(lambda x: both(x, torch.ones(2, N, dtype=torch.bool)), x)
    assert found.empty_rows is EmptyRows.ZERO
    assert lifted(overflowing, *data()).empty_rows is EmptyRows.ZERO


def test_is_causal_beside_finite_minimum_needs_non_empty_rows() -> None:
    def run(x: Tensor, pad: Tensor) -> Tensor:
        return attend(x, torch.where(pad[:, None, None], 0.0, low(x)), is_causal=True)

    assert "fully masked" in refused(run, *data()).reason


def test_fill_given_as_a_tensor() -> None:
    def run(x: Tensor, pad: Tensor) -> Tensor:
        fill = torch.full([], low(x), dtype=x.dtype)
        return eager(x, lambda s: torch.where(keep(pad), s, fill))

    assert lifted(run, *data()).empty_rows is EmptyRows.MEAN


def test_fill_only_known_at_run_time() -> None:
    def run(x: Tensor, pad: Tensor, fill: Tensor) -> Tensor:
        return eager(x, lambda s: torch.where(keep(pad), s, fill))

    assert "run time" in refused(run, *data(), torch.tensor(INF)).reason


def at_or_before(q: Tensor, k: Tensor) -> Tensor:
    return k <= q


@pytest.mark.parametrize(
    "mask,policy",
    [
        (at_or_before, EmptyRows.ZERO),
        (lambda q, k: k < q.clamp(min=1), EmptyRows.ZERO),
        (lambda q, k: k >= q // 2 * 2, EmptyRows.ZERO),
        (lambda q, k: (k < 2) | (k == q), EmptyRows.ZERO),
        (lambda q, k: k >= N - 1 - 0 * q, EmptyRows.ZERO),
        (lambda q, k: k < q, EmptyRows.NAN),
    ],
)
def test_non_empty_by_different_witnesses(mask: Form, policy: EmptyRows) -> None:
    def run(x: Tensor) -> Tensor:
        i = torch.arange(N)
        return eager(x, lambda s: s.masked_fill(~mask(i[:, None], i[None]), INF))

    assert lifted(run, torch.randn(1, 1, N, 4)).empty_rows is policy

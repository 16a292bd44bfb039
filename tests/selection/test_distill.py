"""The distillation loss: its value, its gradients, and what takes no part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_compile.errors import BadShape
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.selection import allowed_units, distillation_loss, pooled_attention


def operands() -> tuple[Tensor, Tensor, Tensor]:
    """Gate scores, a map and the allowed units, of a causal problem; the first row has no mass."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 6, 6, generator=generator)
    allowed = torch.ones(6, 6).tril().bool()
    mass = torch.rand(2, 3, 6, 6, generator=generator) * allowed
    mass[0, 0, 3] = 0
    return scores.requires_grad_(), mass.requires_grad_(), allowed


def plain(scores: Tensor, mass: Tensor, allowed: Tensor) -> Tensor:
    """The definition, row by row, in fp64."""
    losses = []
    for row, target, seen in zip(
        scores.double().flatten(0, 2),
        mass.double().flatten(0, 2),
        allowed.expand(scores.shape).flatten(0, 2),
        strict=True,
    ):
        if target[seen].sum() > 0:
            wanted = target[seen] / target[seen].sum()
            log = row[seen].log_softmax(0)
            losses.append(torch.nn.functional.kl_div(log, wanted, reduction="sum"))
    return torch.stack(losses).mean()


def test_equals_the_definition() -> None:
    scores, mass, allowed = operands()
    loss = distillation_loss(scores, mass, allowed)
    wanted = plain(scores, mass.detach(), allowed)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(loss, scores, retain_graph=True)
    (wanted_grad,) = torch.autograd.grad(wanted, scores)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_gate_only() -> None:
    scores, mass, allowed = operands()
    distillation_loss(scores, mass, allowed).backward()
    assert mass.grad is None
    assert scores.grad is not None
    assert (scores.grad[..., ~allowed] == 0).all()
    assert (scores.grad[0, 0, 3] == 0).all()
    assert scores.grad.isfinite().all()


def test_scores_of_units_that_are_not_allowed_do_not_matter() -> None:
    scores, mass, allowed = operands()
    wanted = distillation_loss(scores, mass, allowed)
    for other in (1e9, -torch.inf, torch.nan):
        changed = scores.masked_fill(~allowed, other)
        assert torch.equal(distillation_loss(changed, mass, allowed), wanted)
    hidden = scores.masked_fill(~allowed, -torch.inf)
    assert torch.equal(distillation_loss(hidden, mass), wanted)
    hidden_grad = torch.autograd.grad(distillation_loss(hidden, mass), scores)[0]
    assert hidden_grad.isfinite().all()


def test_the_map_need_not_be_normalised() -> None:
    scores, mass, allowed = operands()
    torch.testing.assert_close(
        distillation_loss(scores, mass * 7, allowed), distillation_loss(scores, mass, allowed)
    )


def test_zero_where_the_gate_is_right() -> None:
    _, mass, allowed = operands()
    right = mass.detach().clamp_min(1e-30).log()
    assert distillation_loss(right, mass, allowed).abs() < 1e-6
    assert distillation_loss(right + 5, mass, allowed).abs() < 1e-6


def test_nothing_to_learn_from() -> None:
    scores, mass, _ = operands()
    loss = distillation_loss(scores, mass * 0)
    loss.backward()
    assert loss == 0
    assert (scores.grad == 0).all()
    assert distillation_loss(torch.full_like(mass, -torch.inf), mass) == 0


def test_half_precision_scores() -> None:
    scores, mass, allowed = operands()
    half = scores.detach().bfloat16().requires_grad_()
    loss = distillation_loss(half, mass, allowed)
    assert loss.dtype == torch.float32
    loss.backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_descent_finds_the_map() -> None:
    q, k = torch.randn(2, 1, 2, 40, 8, generator=torch.Generator().manual_seed(0)) * 2
    units = {"unit_q": 4, "unit_kv": 8, "mask": MaskExpr(KV <= Q)}
    mass = pooled_attention(q, k, reduce="sum", **units)
    allowed = allowed_units(q, k, **units)
    scores = torch.zeros_like(mass, requires_grad=True)
    optimiser = torch.optim.Adam([scores], 0.3)
    for _ in range(150):
        optimiser.zero_grad()
        distillation_loss(scores, mass, allowed).backward()
        optimiser.step()
    found = scores.detach().masked_fill(~allowed, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, mass, rtol=0, atol=0.02)


def test_mistakes() -> None:
    scores, mass, allowed = operands()
    with pytest.raises(BadShape, match="number of lists of the gate"):
        distillation_loss(scores[:, :2], mass)
    with pytest.raises(BadShape, match=r"allowed \[5, 6\]"):
        distillation_loss(scores, mass, allowed[1:])
    with pytest.raises(BadShape, match="float32"):
        distillation_loss(scores, mass, allowed.float())

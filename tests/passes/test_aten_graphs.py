"""Graphs of ATen operators, as ``torch.export`` writes them, are read as those of functions are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, export

from sparse_compile.sites.plan import Plan
from sparse_compile.sites.site import Rejection
from tests.passes.rewritten import Rewritten, assert_same

B, N, E, H, D = 2, 40, 32, 4, 8
WINDOW = "(kv <= q) & (-kv + q < 9)"
aten = torch.ops.aten


def window(n: int) -> Tensor:
    i = torch.arange(n)
    return (i[:, None] >= i) & (i[:, None] - i < 9)


class Attention(nn.Module):
    """Self-attention in one of some spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        batch, n, _ = x.shape
        q, k, v = self.into(x).view(batch, n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(self.attend(q, k, v, n).transpose(1, 2).reshape(batch, n, E))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=window(n))


class Eager(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(D)
        weights = torch.softmax(scores.masked_fill(~window(n), -math.inf), -1)
        return F.dropout(weights, 0.0, self.training) @ v


class Grouped(Attention):
    """As transformers writes it: repeated heads, a mask that is added, softmax in fp32."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        size = q.shape[0], 2, 2, n, D
        k, v = (x[:, :2, None].expand(size).reshape(size[0], H, n, D) for x in (k, v))
        added = torch.zeros(n, n).masked_fill(~window(n), torch.finfo(q.dtype).min)
        scores = torch.matmul(q, k.transpose(2, 3)) * 0.3 + added[None, None]
        weights = F.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v)


class Softcapped(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        scores = torch.tanh(torch.matmul(q, k.mT) / 20) * 20
        return torch.matmul(torch.where(window(n), scores, -math.inf).softmax(-1), v)


MODULES = (Attention, Eager, Grouped, Softcapped)


def compare(run: Callable[..., Tensor], *args: Tensor, dynamic: bool = False) -> Plan:
    seen = Rewritten()
    args = tuple(x.requires_grad_() for x in args)
    found, truth = seen.compiled(run, dynamic)(*args), run(*args)
    assert_same([found], [truth])
    pairs = (torch.autograd.grad(out.square().sum(), args) for out in (found, truth))
    assert_same(*pairs)
    assert not any("softmax" in target for target in seen.targets())
    for decision in seen.decisions:
        assert isinstance(decision, Plan), decision.reason
    plan = seen.decisions[0]
    assert isinstance(plan, Plan)
    return plan


@pytest.mark.parametrize("sizes", ["known", "symbols"])
@pytest.mark.parametrize("module", MODULES)
def test_exported_modules_are_rewritten(module: type[nn.Module], sizes: str) -> None:
    torch.manual_seed(0)
    model, x = module().eval(), torch.randn(B, N, E)
    ranges = ({0: Dim("batch", min=2, max=64)},) if sizes == "symbols" else None
    plan = compare(export(model, (x,), dynamic_shapes=ranges).module(), x)
    assert str(plan.lifted.mask.predicate) == WINDOW
    assert (plan.lifted.score is not None) == (module is Softcapped)
    heads = plan.site.k.node.meta["example_value"].shape[plan.site.k.axes.index("h")]
    assert heads == (2 if module is Grouped else H)


@pytest.mark.parametrize("module", [Eager, Softcapped])
def test_decomposed_modules_are_rewritten(module: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = module().eval(), torch.randn(B, N, E)
    plan = compare(export(model, (x,)).run_decompositions().module(), x)
    assert str(plan.lifted.mask.predicate) == WINDOW


@pytest.mark.parametrize("grad", [False, True])
def test_an_exported_layer_is_rewritten(grad: bool) -> None:
    """Its fast path is one operator, and else SDPA."""
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(E, H, 48, batch_first=True).eval(), torch.randn(B, N, E)
    seen = Rewritten()
    with torch.set_grad_enabled(grad):
        program = export(layer, (x,), {"src_mask": ~window(N)}).module()
        run = seen.compiled(lambda x: program(x, src_mask=~window(N)))
        assert_same([run(x)], [layer(x, src_mask=~window(N))])
    (plan,) = seen.decisions
    assert isinstance(plan, Plan)
    assert str(plan.lifted.mask.predicate) == WINDOW


# Operators that are called by their names ------------------------------------------------------


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = aten.mul.Scalar(aten.matmul.default(q, aten.transpose.int(k, -2, -1)), 0.3)
    scores = aten.masked_fill.Scalar(scores, aten.logical_not.default(window(N)), -math.inf)
    return aten.matmul.default(aten.softmax.int(scores, -1), v)


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = aten.matmul.default(q, aten.permute.default(k, [0, 1, 3, 2]))
    scores = aten.div_.Tensor(scores, 3.0)
    scores = aten.masked_fill_.Scalar(scores, ~window(N), -math.inf)
    return aten.matmul.default(aten._softmax.default(scores, -1, False), v)


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (aten.view.default(x, [B * H, N, D]) for x in (q, k, v))
    bias = torch.zeros(N, N).masked_fill(~window(N), -math.inf)
    scores = aten.baddbmm.default(bias, q, aten.transpose.int(k, 1, 2), beta=1, alpha=0.3)
    return aten.bmm.default(aten.softmax.int(scores, 2), v).view(B, H, N, D)


def cast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = aten._to_copy.default(q, dtype=torch.float32), aten.to.dtype(k, torch.float32)
    scores = torch.where(window(N), aten.einsum.default("bhqd,bhkd->bhqk", [q, k]), -math.inf)
    return aten.matmul.default(aten._to_copy.default(scores.softmax(-1), dtype=v.dtype), v)


def packets(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return aten.scaled_dot_product_attention(q, k, v, window(N), scale=0.3)


def safe(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = window(N) & (torch.arange(N)[:, None] > 4)  # the first have no key
    scores = torch.where(mask, q @ k.transpose(-2, -1), -math.inf)
    return aten._safe_softmax.default(scores, -1) @ v


OPERATORS = (written_out, in_place, merged, cast, packets, safe)


@pytest.mark.parametrize("run", OPERATORS)
def test_operators_are_known_by_their_names(run: Callable[..., Tensor]) -> None:
    plan = compare(run, *torch.randn(3, B, H, N, D))
    expected = f"(q >= 5) & {WINDOW}" if run is safe else WINDOW
    assert str(plan.lifted.mask.predicate) == expected


def test_operators_of_other_libraries_are_not() -> None:
    library = torch.library.Library("of_a_user", "DEF")
    library.define("softmax(Tensor x, int dim) -> Tensor")
    library.impl("softmax", lambda x, dim: x.exp(), "CompositeImplicitAutograd")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.of_a_user.softmax(q @ k.transpose(-2, -1), -1) @ v

    seen = Rewritten()
    args = torch.randn(3, B, H, N, D)
    assert_same([seen.compiled(run)(*args)], [run(*args)])
    assert seen.decisions == []


def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
    weights = aten.softmax.int(aten.matmul.default(q, k.transpose(-2, -1)), -1)
    return aten.matmul.default(weights, v), weights


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return aten.softmax.int(aten.matmul.default(q, k.transpose(-2, -1)), -2) @ v


LEFT: dict[str, tuple[Callable[..., Any], str]] = {
    "weights are returned": (weights_returned, "weights are also returned"),
    "over the queries": (over_queries, "not over the keys"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_rewritten_stays(name: str) -> None:
    run, reason = LEFT[name]
    seen = Rewritten()
    seen.compiled(run)(*torch.randn(3, B, H, N, D))
    (rejection,) = seen.decisions
    assert isinstance(rejection, Rejection)
    assert reason in rejection.reason

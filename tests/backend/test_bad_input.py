"""Odd and wrong input: results as eager has them, or one clear error before a kernel runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_compile
from sparse_compile import patterns as P
from sparse_compile.errors import BadDevice, BadShape, SparseCompileError
from sparse_compile.expr import KV, N_KV, N_Q, SCORE, B, H, MaskExpr, Q, ScoreProgram, learned
from sparse_compile.layout.from_dense import NO_READS
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.layout.views.split_views import choose_views
from sparse_compile.ops import ATTENTION, LAYOUT
from sparse_compile.sites.plan import Plan
from tests.passes.rewritten import Rewritten

N, D, WINDOW = 40, 8, 6
PATTERN = P.SlidingWindow(WINDOW - 1, 0)
Operands = tuple[Tensor, Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def window(n: int) -> Tensor:
    i = torch.arange(n)
    return (i[:, None] >= i) & (i[:, None] - i < WINDOW)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=window(q.shape[2]))


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * D**-0.5).masked_fill(~window(q.shape[2]), float("-inf"))
    return scores.softmax(-1) @ v


def called(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sparse_compile.attention(q, k, v, PATTERN)


def called_with_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sparse_compile.attention(q, k, v, window(q.shape[2]))


def heads(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def rewritten(made: Rewritten) -> int:
    return sum(isinstance(decision, Plan) for decision in made.decisions)


def step(run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output and the gradient of what q, k and v are made of."""
    x = x.clone().requires_grad_()
    out = run(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x])]


def agrees(run: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor], x: Tensor) -> None:
    for found, wanted in zip(step(run, x), step(exact, x.double()), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


# Operands that share memory --------------------------------------------------------------------


def fused(x: Tensor) -> Operands:
    q, k, v = x.view(2, N, 3, 2, D).permute(2, 0, 3, 1, 4)
    return q, k, v


def overlapping(x: Tensor) -> Operands:
    return (
        x.as_strided((1, 2, N, D), (0, 3, 2, 1)),
        x.as_strided((1, 2, N, D), (0, 5, 1, 2), 7),
        x.as_strided((1, 2, N, D), (0, 1, 3, 1), 11),
    )


def expanded(x: Tensor) -> Operands:
    q, one = x[:, None].expand(2, 2, N, D), x[:1, None]
    return q, one[:, :, :1].expand(2, 2, N, D), one.expand(2, 2, N, D)


def backwards(x: Tensor) -> Operands:
    return x, x.flip(2), x.transpose(2, 3).contiguous().transpose(2, 3)


SHARED: dict[str, tuple[Callable[[Tensor], Operands], tuple[int, ...]]] = {
    "slices of one qkv": (fused, (2, N, 6 * D)),
    "as_strided": (overlapping, (400,)),
    "expanded": (expanded, (2, N, D)),
    "turned": (backwards, (1, 2, N, D)),
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("attend", [sdpa, written_out, called, called_with_tensor])
def test_operands_that_share_memory_or_are_not_contiguous(attend: Attend, name: str) -> None:
    split, sizes = SHARED[name]
    x = heads(*sizes)
    exact = sdpa if attend in (called, called_with_tensor) else attend
    made = Rewritten()
    agrees(made.compiled(lambda x: attend(*split(x))), lambda x: exact(*split(x)), x)
    assert rewritten(made) == 1
    if attend in (called, called_with_tensor):
        agrees(lambda x: attend(*split(x)), lambda x: exact(*split(x)), x)


# Nothing to attend to --------------------------------------------------------------------------

EMPTY = {"batch": (0, 2, N, D), "length": (1, 2, 0, D)}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("attend", [sdpa, written_out, called, called_with_tensor])
def test_no_batch_and_no_tokens(attend: Attend, name: str) -> None:
    x = heads(*EMPTY[name])
    exact = sdpa if attend in (called, called_with_tensor) else attend
    made = Rewritten()
    agrees(made.compiled(lambda x: attend(x, x, x)), lambda x: exact(x, x, x), x)
    assert rewritten(made) == 1
    if attend in (called, called_with_tensor):
        agrees(lambda x: attend(x, x, x), lambda x: exact(x, x, x), x)


@pytest.mark.parametrize("attend", [sdpa, written_out])
@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((1, 0, N, D), "q has 0 heads, not a multiple of the 0 of k and v"),
        ((1, 2, N, 0), "q and k have no features"),
    ],
)
def test_no_heads_and_no_features_stay_as_they_are(
    attend: Attend, sizes: tuple[int, ...], reason: str
) -> None:
    x, made = heads(*sizes), Rewritten()
    found, wanted = made.compiled(attend)(x, x, x), attend(x, x, x)
    torch.testing.assert_close(found, wanted, equal_nan=True)
    assert [one.reason for one in made.decisions] == [reason]


def test_values_without_features_stay_as_they_are() -> None:
    x, made = heads(1, 2, N, D), Rewritten()
    assert made.compiled(sdpa)(x, x, x[..., :0]).shape == (1, 2, N, 0)
    assert [one.reason for one in made.decisions] == ["v has no features"]


@pytest.mark.parametrize("mask", [PATTERN, window(N), None], ids=["pattern", "tensor", "none"])
def test_attention_without_heads_or_features_is_an_error(mask: Any) -> None:
    with pytest.raises(BadShape, match="at least one head"):
        sparse_compile.attention(*[heads(1, 0, N, D)] * 3, mask)
    with pytest.raises(BadShape, match="head dims must lie in 1 to"):
        sparse_compile.attention(*[heads(1, 2, N, 0)] * 3, mask)


# What nobody may attend to ---------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("direct", [False, True])
def test_what_nobody_may_attend_to_reaches_nobody(bad: float, direct: bool) -> None:
    """Keys and values that are no numbers, hidden from everybody: as zeros in their place."""
    hidden = torch.zeros(N, dtype=torch.bool)
    hidden[[5, 17]] = True
    ids = hidden.int()[None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = window(N) & ~hidden & ~hidden[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = (P.Documents(ids) & PATTERN).dense(N, N) & ~hidden & ~hidden[:, None]
        return sparse_compile.attention(q, k, v, seen)

    q, k, v = (heads(1, 2, N, D, seed=seed) for seed in range(3))
    dirty_k, dirty_v = (t.masked_fill(hidden[:, None], bad) for t in (k, v))
    clean_k, clean_v = (t.masked_fill(hidden[:, None], 0) for t in (k, v))
    made = Rewritten()
    run = ours if direct else made.compiled(attend)
    given = [t.requires_grad_() for t in (q.clone(), dirty_k, dirty_v)]
    exact = [t.double().requires_grad_() for t in (q, clean_k, clean_v)]
    found, wanted = run(*given), attend(*exact)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(found.square().sum(), given)
    exact_grads = torch.autograd.grad(wanted.square().sum(), exact)
    for mine, theirs in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    assert direct or rewritten(made) == 1


# Code that torch.compile takes apart -----------------------------------------------------------


def broken_at_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~window(N), float("-inf"))
    torch._dynamo.graph_break()
    return scores.softmax(-1) @ v


def broken_at_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).masked_fill(~window(N), float("-inf")).softmax(-1)
    torch._dynamo.graph_break()
    return weights @ v


def broken_at_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = window(N)
    torch._dynamo.graph_break()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize(
    ("attend", "expected"), [(broken_at_scores, 0), (broken_at_weights, 0), (broken_at_mask, 1)]
)
def test_graph_breaks_inside_an_attention(attend: Attend, expected: int) -> None:
    made = Rewritten()
    run = made.compiled(attend)
    agrees(lambda x: run(x, x, x), lambda x: attend(x, x, x), heads(1, 2, N, D))
    assert rewritten(made) == expected


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x, x, x)
        return out * 2


class Inner(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v)


def before(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (given[0] * 2, *given[1:])


def after(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out + 1


def broken_after(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return out + 1


def of_gradients(module: nn.Module, into: Any, out: Any) -> Any:
    return tuple(None if grad is None else grad * 3 for grad in into)


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "pre": lambda m: m.register_forward_pre_hook(before),
    "forward": lambda m: m.register_forward_hook(after),
    "forward that breaks the graph": lambda m: m.register_forward_hook(broken_after),
    "backward": lambda m: m.register_full_backward_hook(of_gradients),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_on_an_attention_run(name: str) -> None:
    model, made = Attention(), Rewritten()
    HOOKS[name](model.inner)
    run = made.compiled(model)
    x = heads(1, 2, N, D)
    wanted = step(model, x)
    for found in (step(run, x), step(run, x)):
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert rewritten(made) == 1


def test_hooks_that_look_see_what_eager_shows_them() -> None:
    seen: list[Tensor] = []
    model, made = Attention(), Rewritten()
    model.inner.register_forward_hook(lambda m, given, out: seen.append(out.detach()))
    x = heads(1, 2, N, D)
    made.compiled(model)(x)
    model(x)
    torch.testing.assert_close(seen[0], seen[1])
    assert rewritten(made) == 1


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
def test_deterministic_mode_repeats_dropout() -> None:
    def attend(x: Tensor) -> Tensor:
        mask = window(x.shape[2])
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask, dropout_p=0.5)

    x, made = heads(1, 2, N, D), Rewritten()
    run = made.compiled(attend)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(step(run, x))
    assert all(map(torch.equal, *results))
    assert rewritten(made) == 1
    # Row 0 sees one key: dropped, or kept and doubled.
    share = results[0][0][0, 0, 0] / x[0, 0, 0]
    assert all(abs(value) < 1e-6 or abs(value - 2) < 1e-5 for value in share.tolist())


# Several devices -------------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("mask", [PATTERN, window(N), None], ids=["pattern", "tensor", "none"])
def test_operands_on_several_devices_are_an_error(which: int, mask: Any) -> None:
    x = heads(1, 2, N, D)
    given = [x.to("meta") if i == which else x for i in range(3)]
    with pytest.raises(BadDevice, match="must be on one device"):
        sparse_compile.attention(*given, mask)


def test_masks_on_a_device_without_data_are_an_error() -> None:
    x = heads(1, 2, N, D)
    ids = torch.zeros(1, N, dtype=torch.int32, device="meta")
    with pytest.raises(BadDevice, match="mask on the meta device"):
        sparse_compile.attention(x, x, x, window(N).to("meta"))
    with pytest.raises(BadDevice, match="reads a tensor on the meta device"):
        sparse_compile.attention(x, x, x, P.Documents(ids))
    with pytest.raises(BadDevice, match="got q on the meta device"):
        sparse_compile.attention(*[x.to("meta")] * 3, PATTERN)


def test_several_devices_in_compiled_code_are_an_error() -> None:
    x = heads(1, 2, N, D)
    other = x.to("meta")
    run = torch.compile(lambda x: sdpa(x, other, other), backend="sparse_compile")
    with pytest.raises(Exception, match="device"):
        run(x)
    with pytest.raises(Exception, match="one device"):
        torch.compile(called, backend="sparse_compile")(x, other, other)


def test_a_model_without_data_stays_as_it_is() -> None:
    x, made = heads(1, 2, N, D).to("meta"), Rewritten()
    mask = window(N).to("meta")
    run = made.compiled(lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=mask))
    assert run(x).is_meta
    (decision,) = made.decisions
    assert "on the meta device, which holds no data" in decision.reason


@pytest.mark.parametrize("wrong", [None, [[1.0]], heads(1, 2, N, D).to_sparse()])
def test_what_is_no_dense_tensor_is_an_error(wrong: Any) -> None:
    x = heads(1, 2, N, D)
    with pytest.raises(BadShape, match="v must be a dense tensor"):
        sparse_compile.attention(x, x, wrong, PATTERN)


# Tensors that scores read ----------------------------------------------------------------------

READS: dict[str, tuple[tuple[sympy.Expr, ...], tuple[int, ...]]] = {
    "pair": ((H, Q, KV), (2, N, N)),
    "key": ((B, KV), (1, N)),
    "distance": ((H, KV - Q + N_Q - 1), (2, 2 * N - 1)),
    "from the end": ((N_KV - 1 - KV,), (N,)),
    "a number": ((sympy.Integer(2),), (3,)),
}


def scored(
    indices: tuple[sympy.Expr, ...], given: list[Tensor], mask: sympy.Basic = sympy.true
) -> Tensor:
    program = ScoreProgram(SCORE + learned(0)(*indices), ("float32",))
    plain, _ = choose_views(MaskExpr(mask), ProblemShape(1, 2, N, N))
    spec = replace(plain, score=program).text
    x = heads(1, 2, N, D)
    lists = LAYOUT([], NO_READS, [], 1, 2, N, N, 2, spec, x.device, [])
    out: Tensor = ATTENTION(x, x, x, given, [], [], lists, 1.0, spec)[0]
    return out


@pytest.mark.parametrize("name", READS)
def test_scores_that_read_beyond_a_tensor_are_an_error(name: str) -> None:
    indices, sizes = READS[name]
    table = heads(*sizes)
    out = scored(indices, [table])
    assert out.isfinite().all()
    short = table[..., :-1]
    with pytest.raises(BadShape, match=rf"but w0 has shape .* Make that dimension {sizes[-1]}\."):
        scored(indices, [short])
    with pytest.raises(BadShape, match=f"Give it {len(sizes)} dimensions"):
        scored(indices, [table[None]])
    with pytest.raises(BadShape, match="got 0 learned tensors, and its spec reads 1"):
        scored(indices, [])


def test_what_a_mask_hides_may_be_beyond_a_tensor() -> None:
    """A window has no bias beyond its ends."""
    window = sympy.And(KV - Q <= 4, Q - KV <= 4)
    table, index = heads(2, 9), (H, KV - Q + 4)
    whole = torch.zeros(2, 2 * N - 1)
    whole[:, N - 5 : N + 4] = table
    torch.testing.assert_close(
        scored(index, [table], window), scored((H, KV - Q + N - 1), [whole], window)
    )


def test_scores_that_read_before_a_tensor_are_an_error() -> None:
    with pytest.raises(SparseCompileError, match="at index -39 of dimension 0"):
        scored((KV - Q,), [heads(2 * N)])

"""Programs that look like attention and are not, or not one that may be rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.passes.find import find_attention
from sparse_compile.sites.site import Rejection
from tests.passes.capture import capture_one
from tests.passes.test_find_eager import repeat_kv, tensors

B, H, N, D = 2, 4, 6, 8
INF = float("inf")
Case = Callable[..., Any]


def softmax_of(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)


def causal() -> Tensor:
    return torch.ones(N, N, dtype=torch.bool).tril()


def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = softmax_of(q, k)
    return weights @ v, weights


def weights_for_two_values(q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = softmax_of(q, k)
    return weights @ v, weights @ k


def scores_in_the_loss(q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores.square().mean()


def bool_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + causal()).softmax(-1) @ v


def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def softmax_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(1) @ v


def softmax_without_an_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.mT, _stacklevel=5) @ v


def talking_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixing = torch.eye(H) + 0.1
    scores = torch.einsum("bhqk,hg->bgqk", q @ k.mT, mixing)
    return scores.softmax(-1) @ v


def heads_mixed_by_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = F.linear((q @ k.mT).permute(0, 2, 3, 1), torch.ones(H, H)).permute(0, 3, 1, 2)
    return scores.softmax(-1) @ v


def heads_mixed_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhqk,hg->bgqk", softmax_of(q, k), torch.eye(H) + 0.1)
    return weights @ v


def masked_after_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax_of(q, k).masked_fill(~causal(), 0.0) @ v


def multiplied_after_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (softmax_of(q, k) * causal()) @ v


def renormalized(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = softmax_of(q, k)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (softmax_of(q, k) - 0.2 * softmax_of(q + 1, k * 2)) @ v


def sink() -> Tensor:
    return torch.ones(B, H, N, 1)


def sinks_not_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT, sink()], -1)
    return scores.softmax(-1) @ torch.cat([v, v[:, :, :1]], -2)


def the_wrong_column_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([q @ k.mT, sink()], -1).softmax(-1)[..., 1:] @ v


def two_columns_and_one_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.cat([q @ k.mT, sink(), sink()], -1).softmax(-1)
    return weights[..., :-1][..., :-1] @ v


def sinks_added_to_the_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([q @ k.mT, sink().mT], -2).softmax(-1)[..., :-1, :] @ v


def weights_with_sinks_returned(q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = torch.cat([q @ k.mT, sink()], -1).softmax(-1)[..., :-1]
    return weights @ v, weights


def share_of_the_sink_returned(q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = torch.cat([q @ k.mT, sink()], -1).softmax(-1)
    return weights[..., :-1] @ v, weights[..., -1:]


def another_maximum_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT, sink()], -1)
    return (scores - q.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v


def sinks_of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return torch.cat([scores, scores.mean(-1, True)], -1).softmax(-1)[..., :-1] @ v


def masked_then_softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh((q @ k.mT).masked_fill(~causal(), -INF) / 30) * 30).softmax(-1) @ v


def softcapped_scores_in_the_loss(q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = torch.tanh(q @ k.mT / 30)
    return (scores * 30).softmax(-1) @ v, scores.square().mean()


def softcapped_at_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT) * 0).softmax(-1) @ v


def another_curve(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.atan(q @ k.mT / 30) * 30).softmax(-1) @ v


def keys_of_another_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Contracts queries with keys, so that the weights are [D, D], and multiplies [N, D]."""
    return torch.einsum("bhqk,bhkd->bhqd", (q.mT @ k).softmax(-1)[..., :N, :N], v)


def values_on_the_wrong_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhqd->bhkd", softmax_of(q, k), v)


def values_not_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhkd->bhqkd", softmax_of(q, k), v)


def weights_overwritten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = softmax_of(q, k)
    weights[..., 0] = 0.0
    return weights @ v


def weights_scaled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = softmax_of(q, k)
    weights.mul_(0.5)
    return weights @ v


def a_column_of_scores_overwritten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[..., 0] = 0.0
    return scores.softmax(-1) @ v


def a_view_of_the_scores_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[..., :3].mul_(2.0)
    return scores.softmax(-1) @ v


def a_transposed_view_of_the_scores_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.mT.masked_fill_(~causal(), -INF)
    return scores.softmax(-1) @ v


def scores_kept_before_an_update(q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = q @ k.mT
    raw = scores.clone()
    scores.mul_(0.5)
    return scores.softmax(-1) @ v, raw


def scores_added_to_the_mask_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(B, H, N, N)
    mask += q @ k.mT
    return mask.softmax(-1) @ v


def query_overwritten_meanwhile(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = softmax_of(q, k)
    q.zero_()
    return weights @ v


def keys_overwritten_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = softmax_of(q, k)
    k[:, 0].zero_()
    return weights @ v


def detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax_of(q, k).detach() @ v


def without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    with torch.no_grad():
        weights = scores.softmax(-1)
    return weights @ v


def two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + (q + 1) @ (k * 2).mT).softmax(-1) @ v


def masked_by_a_negative_temperature(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).masked_fill(~causal(), -INF) * -torch.ones(H, 1, 1)).softmax(-1) @ v


def added_then_multiplied_by_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT + torch.ones(N)) * torch.ones(H, 1, 1)).softmax(-1) @ v


def multiplied_by_integers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * torch.arange(N)).softmax(-1) @ v


def added_to_with_a_negative_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT + torch.ones(N)) * -1.0).softmax(-1) @ v


def dropped_before_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(q @ k.mT, 0.1).softmax(-1) @ v


def dropped_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(F.dropout(softmax_of(q, k), 0.1), 0.2) @ v


def dropped_with_a_mask_of_its_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = softmax_of(q, k)
    return (weights * torch.bernoulli(torch.full((N, N), 0.9))) @ v


def whole_heads_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout2d(softmax_of(q, k), 0.1) @ v


def nan_made_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax_of(q, k).nan_to_num(1.0) @ v


def masked_after_softmax_by_another_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~causal(), -INF)
    return scores.softmax(-1).masked_fill(torch.ones(N, N).triu().bool(), 0.0) @ v


def masked_after_softmax_with_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = ~causal()
    return (q @ k.mT).masked_fill(hidden, -INF).softmax(-1).masked_fill(hidden, 0.1) @ v


def raised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).clamp(max=10).softmax(-1) @ v


def another_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return (scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v


def subtracted_from_a_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.ones(N) - q @ k.mT).softmax(-1) @ v


def masked_with_a_negative_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).masked_fill(~causal(), INF) * -1.0).softmax(-1) @ v


def chosen_from_another_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(causal(), q @ k.mT, torch.rand(N, N)).softmax(-1) @ v


def fill_changed_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    fill = torch.full_like(scores, -INF)
    fill[..., 0] = 0.0
    return torch.where(causal(), scores, fill).softmax(-1) @ v


def clamped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).clamp(min=-10).softmax(-1) @ v


def query_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax_of(q[:, :1], k) @ v


def keys_of_one_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax_of(q, k[:1]) @ v[:1]


def scores_broadcast_by_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q[:1] @ k[:1].mT + torch.zeros(3, 1, N, N)).softmax(-1) @ v[:1]


def queries_and_keys_reshaped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).reshape(B, H, N * N).view(B, H, 4, 9).softmax(-1) @ v[:, :, :1].expand(
        B, H, 9, D
    )


def wide_scores_narrow_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax_of(q, k).bfloat16() @ v.bfloat16()


def doubles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax_of(q.double(), k.double()) @ v.double()


REJECTED: dict[Case, str] = {
    weights_returned: "weights are also returned",
    weights_for_two_values: "weights are also read by `matmul` (test_find_near_misses.py:",
    scores_in_the_loss: "scores are also read by `square`",
    bool_added: "adds 0 or 1",
    softmax_over_queries: "over the queries",
    softmax_over_heads: "over the heads",
    softmax_without_an_axis: "does not say over which axis",
    talking_heads: "heads are mixed",
    heads_mixed_by_linear: "`permute` changes the scores",
    heads_mixed_after: "not summed over the keys",
    masked_after_softmax: "`masked_fill` changes the attention weights",
    multiplied_after_softmax: "`mul` changes the attention weights",
    renormalized: "weights are also read by",
    differential: "`sub` changes the attention weights",
    sinks_not_dropped: "not dropped",
    the_wrong_column_dropped: "`getitem` changes the attention weights",
    two_columns_and_one_dropped: "several tensors",
    sinks_added_to_the_queries: "several tensors",
    weights_with_sinks_returned: "weights are also returned",
    share_of_the_sink_returned: "weights are also read by",
    another_maximum_subtracted: "not known as attention sinks",
    sinks_of_scores: "scores are also read by `mean`",
    masked_then_softcapped: "masked before the tanh",
    softcapped_scores_in_the_loss: "scores are also read by `square`",
    softcapped_at_zero: "multiplied by zero",
    another_curve: "`atan` changes the scores",
    keys_of_another_axis: "`getitem` changes the attention weights",
    values_on_the_wrong_axis: "not summed over the keys",
    values_not_summed: "not summed over the keys",
    weights_overwritten: "in place after the softmax",
    weights_scaled_in_place: "in place after the softmax",
    a_column_of_scores_overwritten: "overwritten in part",
    a_view_of_the_scores_scaled: "overwritten in part",
    a_transposed_view_of_the_scores_masked: "overwritten in part",
    scores_kept_before_an_update: "scores are also read by `clone`",
    scores_added_to_the_mask_in_place: "added to the mask in place",
    query_overwritten_meanwhile: "changed in place between",
    keys_overwritten_through_a_view: "changed in place between",
    detached: "`detach` changes the attention weights",
    without_gradients: "gradients are switched on or off",
    two_products: "sum of two products",
    masked_by_a_negative_temperature: "or they were masked",
    added_then_multiplied_by_a_tensor: "after something was added",
    multiplied_by_integers: "no floating tensor",
    added_to_with_a_negative_scale: "masked before they are scaled",
    dropped_before_the_softmax: "dropped before the softmax",
    dropped_twice: "twice",
    dropped_with_a_mask_of_its_own: "`mul` changes the attention weights",
    whole_heads_dropped: "`dropout2d` changes the attention weights",
    nan_made_one: "`nan_to_num` changes the attention weights",
    masked_after_softmax_by_another_mask: "`masked_fill` changes the attention weights",
    masked_after_softmax_with_a_number: "`masked_fill` changes the attention weights",
    raised: "`clamp` changes the scores",
    another_maximum: "read by",
    subtracted_from_a_bias: "`ones` changes the scores",
    masked_with_a_negative_scale: "masked before they are scaled",
    chosen_from_another_tensor: "another tensor",
    fill_changed_in_place: "another tensor",
    clamped: "`clamp` changes the scores",
    query_broadcast: "q is broadcast",
    keys_of_one_batch: "batch size 1",
    scores_broadcast_by_the_mask: "larger shape",
    queries_and_keys_reshaped: "reshaped before the softmax",
    wide_scores_narrow_output: "float32 operands but the output is bfloat16",
    doubles: "float64",
}


@pytest.mark.filterwarnings("ignore:Implicit dimension choice for softmax")
@pytest.mark.parametrize("fn", REJECTED, ids=lambda fn: fn.__name__)
def test_rejected_with_a_reason(fn: Case) -> None:
    args = [x.requires_grad_() for x in tensors(*[(B, H, N, D)] * 3)]
    grad = fn is without_gradients
    found = find_attention(capture_one(fn, *args, grad=grad).gm)
    assert found
    assert all(isinstance(rejection, Rejection) for rejection in found)
    assert any(REJECTED[fn] in rejection.reason for rejection in found), found
    for rejection in found:
        assert rejection.where[-1].startswith("test_find_near_misses.py:")
        assert rejection.node is not None


def router(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mixture of experts: softmax over experts, top two, weighted sum."""
    x, gate, experts = q.flatten(0, 2), k[0, 0], v[0]
    chosen, index = (x @ gate.mT).softmax(-1).topk(2)
    hidden = torch.einsum("td,edf->tef", x, experts[:, :, :].mT[:, :D, :N].repeat(2, 1, 1)[:N])
    picked = hidden.gather(1, index[..., None].expand(-1, -1, N))
    return (picked * chosen[..., None]).sum(1)


def classifier(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.linear(q, k[0, 0]).softmax(-1)


def pooling(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights from one learned query vector per token; no keys."""
    return (q.mean(-1, keepdim=True).softmax(-2) * v).sum(-2)


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).sigmoid() @ v


def exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raised = (q @ k.mT).exp()
    return (raised / raised.sum(-1, keepdim=True)) @ v


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def softmax_unused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax_of(q, k).argmax(-1)


@pytest.mark.parametrize(
    "fn",
    [router, classifier, pooling, sigmoid, exponentials, linear_attention, softmax_unused],
    ids=lambda fn: fn.__name__,
)
def test_ignored(fn: Case) -> None:
    assert find_attention(capture_one(fn, *tensors(*[(B, H, N, D)] * 3)).gm) == ()


def test_integers_are_not_attention() -> None:
    q, k, v = (x.long() for x in tensors(*[(B, H, N, D)] * 3))
    found = find_attention(
        capture_one(
            lambda q, k, v: (q @ k.mT).softmax(-1, dtype=torch.float32) @ v.float(), q, k, v
        ).gm
    )
    assert all(isinstance(rejection, Rejection) for rejection in found)


def test_scales_known_at_run_time_are_rejected_in_combination() -> None:
    cases = (
        lambda q, k, v, s: (q @ k.mT * s * s).softmax(-1) @ v,
        lambda q, k, v, s: ((q @ k.mT).masked_fill(~causal(), -INF) * s).softmax(-1) @ v,
    )
    for fn in cases:
        (found,) = find_attention(
            capture_one(fn, *tensors(*[(B, H, N, D)] * 3), torch.tensor(0.3)).gm
        )
        assert isinstance(found, Rejection)
        assert "run time" in found.reason


def test_a_grouped_query_that_does_not_divide() -> None:
    q, k, v = tensors((B, 6, N, D), (B, 2, N, D), (B, 2, N, D))
    (found,) = find_attention(
        capture_one(lambda q, k, v: softmax_of(q, repeat_kv(k, 3)) @ repeat_kv(v, 3), q, k, v).gm
    )
    assert not isinstance(found, Rejection)

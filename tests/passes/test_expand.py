"""Attention that modules hide in one call is written out, rewritten, and equal to the call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from sparse_compile.options import Options
from sparse_compile.passes import pipeline
from sparse_compile.passes.expand import expand
from sparse_compile.sites.plan import Plan
from sparse_compile.sites.site import Rejection
from tests.passes.rewritten import Rewritten, assert_same, trained

B, N, E, H = 2, 40, 16, 2
CAUSAL = torch.ones(N, N, dtype=torch.bool).triu(1)
PADDED = torch.arange(N) >= torch.tensor([[30], [25]])


def minus_inf(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, -math.inf)


class Attend(nn.Module):
    """``nn.MultiheadAttention``, called in one way; it returns the output only."""

    def __init__(self, made: dict[str, Any], called: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(E, H, **made)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.called = called

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v, **self.called)[0]


FIRST = {"batch_first": True}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bool mask": (FIRST, {"attn_mask": CAUSAL}),
    "tokens first": ({}, {"attn_mask": CAUSAL}),
    "floating mask": (FIRST, {"attn_mask": minus_inf(CAUSAL)}),
    "mask for each head": (FIRST, {"attn_mask": CAUSAL.expand(B * H, N, N)}),
    "padding": (FIRST, {"key_padding_mask": PADDED}),
    "floating padding": (FIRST, {"key_padding_mask": minus_inf(PADDED)}),
    "both": (FIRST, {"attn_mask": CAUSAL, "key_padding_mask": PADDED}),
    "both and a hint": (
        FIRST,
        {"attn_mask": CAUSAL, "key_padding_mask": PADDED, "is_causal": True},
    ),
    "biases": ({**FIRST, "add_bias_kv": True}, {"attn_mask": CAUSAL}),
    "a key of zeros": ({**FIRST, "add_zero_attn": True}, {"key_padding_mask": PADDED}),
    "other sizes": ({**FIRST, "kdim": 8, "vdim": 24}, {"attn_mask": CAUSAL}),
    "no bias": ({**FIRST, "bias": False}, {"attn_mask": CAUSAL}),
    "all padded": (FIRST, {"key_padding_mask": torch.ones(B, N, dtype=torch.bool)}),
}


def operands(made: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; the same tensor where the sizes are."""
    q = torch.randn(B, N, E)
    k, v = (torch.randn(B, N, made[name]) if name in made else q for name in ("kdim", "vdim"))
    if not made.get("batch_first"):
        q = k = v = q.transpose(0, 1)
    return q, k, v


def compare(model: nn.Module, args: Sequence[Any], dynamic: bool = False) -> Rewritten:
    """Outputs and gradients are those of the program; what became of its attention."""
    seen = Rewritten()
    truth = trained(model, model, *args)
    assert_same(trained(seen.compiled(model, dynamic), model, *args), truth)
    return seen


def only_plan(seen: Rewritten) -> Plan:
    (plan,) = seen.decisions
    assert isinstance(plan, Plan), plan.reason
    return plan


def only_rejection(seen: Rewritten) -> Rejection:
    (rejection,) = seen.decisions
    assert isinstance(rejection, Rejection)
    return rejection


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_modules_are_rewritten(name: str, weights: bool) -> None:
    made, called = FORMS[name]
    model = Attend(made, {**called, "need_weights": weights})
    seen = compare(model, operands(made))
    assert only_plan(seen).site.kind == ("eager" if weights else "sdpa")
    assert seen.traces[0].where[-1].startswith("test_expand.py:")
    assert not any("softmax" in target or "scaled_dot" in target for target in seen.targets())


@pytest.mark.parametrize("weights", [False, True])
def test_sizes_may_be_symbols(weights: bool) -> None:
    model = Attend(FIRST, {**FORMS["both"][1], "need_weights": weights})
    q, _, _ = operands(FIRST)
    seen = Rewritten()
    call = seen.compiled(lambda x: model(x, x, x), dynamic=True)
    assert_same(trained(call, model, q), trained(lambda x: model(x, x, x), model, q))
    assert seen.decisions
    assert all(isinstance(plan, Plan) for plan in seen.decisions)


def test_unbatched_operands_are_rewritten() -> None:
    model = Attend(FIRST, {"attn_mask": CAUSAL, "need_weights": False})
    (q, *_), seen = torch.randn(1, N, E), Rewritten()
    assert_same(trained(seen.compiled(model), model, q, q, q), trained(model, model, q, q, q))
    only_plan(seen)


def test_dropout_is_left_to_the_passes_that_follow() -> None:
    model = Attend({**FIRST, "dropout": 0.3}, {"attn_mask": CAUSAL, "need_weights": False})
    x, seen = torch.randn(B, N, E), Rewritten()
    seen.compiled(model)(x, x, x)
    assert only_plan(seen).site.dropout == 0.3


def test_a_call_in_a_checkpoint_is_rewritten() -> None:
    class Checkpointed(Attend):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return checkpoint(super().forward, q, k, v, use_reentrant=False)

    model = Checkpointed(FIRST, {"attn_mask": CAUSAL, "need_weights": False})
    only_plan(compare(model, operands(FIRST)))


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_is_that_of_the_call(inside: bool) -> None:
    model = Attend(FIRST, {"attn_mask": CAUSAL, "need_weights": False})
    q, _, _ = operands(FIRST)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return model(x, x, x)

    seen = Rewritten()
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        found, truth = seen.compiled(run)(q), run(q)
    torch.testing.assert_close(found, truth, atol=2e-2, rtol=2e-2)
    assert only_plan(seen).site.q.node.meta["example_value"].dtype is truth.dtype


# The fast path of modules that are not trained -------------------------------------------------


def encoder(**made: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True, **made).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


ENCODED: dict[str, dict[str, Any]] = {
    "no mask": {},
    "mask": {"src_mask": CAUSAL},
    "padding": {"src_key_padding_mask": PADDED},
    "both": {"src_mask": CAUSAL, "src_key_padding_mask": PADDED},
    "all padded": {"src_key_padding_mask": torch.ones(B, N, dtype=torch.bool)},
}


def compare_untrained(run: Callable[..., Tensor], *args: Any, dynamic: bool = False) -> Rewritten:
    seen = Rewritten()
    with torch.no_grad():
        assert_same([seen.compiled(run, dynamic)(*args)], [run(*args)])
    return seen


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("name", ENCODED)
def test_layers_are_rewritten(name: str, activation: str, norm_first: bool) -> None:
    layer = encoder(activation=activation, norm_first=norm_first)
    x = torch.randn(B, N, E)
    seen = compare_untrained(lambda x: layer(x, **ENCODED[name]), x)
    plan = only_plan(seen)
    assert plan.executor == ("sdpa" if name == "no mask" else "cpu")
    assert not any("_transformer_encoder_layer_fwd" in target for target in seen.targets())


def test_layers_of_symbolic_sizes_are_rewritten() -> None:
    layer = encoder()
    seen = compare_untrained(
        lambda x: layer(x, **ENCODED["both"]), torch.randn(B, N, E), dynamic=True
    )
    assert seen.decisions
    assert all(isinstance(plan, Plan) for plan in seen.decisions)


def test_layers_of_an_encoder_share_what_they_read() -> None:
    layers = [encoder() for _ in range(3)]

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x, src_mask=CAUSAL)
        return x

    seen = compare_untrained(run, torch.randn(B, N, E))
    assert [type(plan) for plan in seen.decisions] == [Plan] * 3
    assert sum("sparse_compile.layout" in target for target in seen.targets()) == 1


WEIGHTS = [torch.randn(3 * E, E), torch.randn(3 * E), torch.randn(E, E), torch.randn(E)]
NATIVE: dict[str, tuple[int, Tensor | None, int | None]] = {
    "self": (1, None, None),
    "pairs": (1, CAUSAL, 0),
    "keys of another": (2, PADDED, 1),
    "three": (3, torch.rand(B, H, N, N) > 0.5, 2),
    "numbers are bools": (1, minus_inf(PADDED), 1),
}


@pytest.mark.parametrize("name", NATIVE)
def test_the_native_call_is_rewritten(name: str) -> None:
    different, mask, kind = NATIVE[name]

    def run(*given: Tensor) -> Tensor:
        q, k, v = (given[min(at, different - 1)] for at in range(3))
        called = torch._native_multi_head_attention
        return called(q, k, v, E, H, *WEIGHTS, mask, False, True, kind)[0]

    only_plan(compare_untrained(run, *torch.randn(different, B, N, E)))


# What stays as it is ---------------------------------------------------------------------------


def left(run: Callable[..., Any], *args: Any, grad: bool = True) -> Rejection:
    """Why an attention is left alone; the graph is then just as it was."""
    seen = Rewritten()
    found: list[tuple[str, str]] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        before = str(gm.graph)
        seen.traces += pipeline.run(gm, inputs, Options(decide="sparse"))
        found.append((before, str(gm.graph)))
        return gm

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(run, backend=backend, dynamic=False)(*args)
    assert all(before == after for before, after in found)
    return only_rejection(seen)


def module(**called: Any) -> Attend:
    return Attend(FIRST, {"attn_mask": CAUSAL, "need_weights": False, **called})


SHARED = module()


def native_weights(x: Tensor) -> Any:
    return torch._native_multi_head_attention(x, x, x, E, H, *WEIGHTS)


LEFT: dict[str, tuple[Callable[..., Any], str]] = {
    "weights are used": (
        lambda x: module(need_weights=True).attention(x, x, x),
        "its attention weights are returned",
    ),
    "weights of the native call are used": (native_weights, "its attention weights are returned"),
    "in a vmap": (
        torch.vmap(lambda y: SHARED.attention(y, y, y, need_weights=False)[0]),
        "inside a torch.func transform",
    ),
    "fp64": (lambda x: module().double()(*[x.double()] * 3), "float64"),
    "nothing is hidden": (
        lambda x: module(attn_mask=None)(x, x, x),
        "PyTorch's own kernel already skips",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_rewritten_stays(name: str) -> None:
    run, reason = LEFT[name]
    rejection = left(run, torch.randn(B, N, E), grad=False)
    assert reason in rejection.reason
    assert rejection.where[-1].startswith("test_expand.py:")


def test_nested_tensors_stay() -> None:
    model = module()

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        (call,) = (node for node in gm.graph.nodes if "multi_head" in node.name)
        nested = torch.nested.nested_tensor([torch.randn(9, E), torch.randn(7, E)])
        call.args[0].meta["example_value"] = nested
        ((_, refused),) = expand(gm, inputs).refusals.items()
        assert "is a nested tensor, not a plain tensor" in refused.reason
        assert refused.hint
        return gm

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(*torch.randn(3, B, N, E))


def test_graphs_without_such_calls_are_not_touched() -> None:
    seen: list[str] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        before = str(gm.graph)
        expanded = expand(gm, inputs)
        assert not expanded.shadows
        assert not expanded.refusals
        assert str(gm.graph) == before
        seen.append(before)
        return gm

    torch.compile(F.scaled_dot_product_attention, backend=backend)(*torch.randn(3, 1, 2, N, 8))
    assert seen


def test_shadows_have_no_dead_nodes_and_the_metadata_of_the_call() -> None:
    model = module(need_weights=True)

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        ((call, shadow),) = expand(gm, inputs).shadows.items()
        kept = [new for _, new in shadow.outputs]
        assert all(node.users or node in kept for node in shadow.nodes)
        for node in shadow.nodes:
            assert "example_value" in node.meta
            assert node.meta["stack_trace"] == call.meta["stack_trace"]
            assert node.meta["nn_module_stack"] == call.meta["nn_module_stack"]
        return gm

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(*torch.randn(3, B, N, E))

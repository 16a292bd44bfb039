"""mask(pattern) on classes, modules, methods and functions: what it means, and that it lasts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import sparse_compile
from sparse_compile import mask
from sparse_compile import patterns as P
from sparse_compile.errors import (
    BadOption,
    BadPattern,
    BrokenPromise,
    PatternMisuse,
    RestrictionFailed,
)
from sparse_compile.reference import attention as reference
from tests.tolerance import relative_error

B, H, N, D = 2, 2, 40, 8
WINDOW = P.SlidingWindow(5, 2)
OTHER = P.SlidingWindow(1, 0)


def sdpa(q: Tensor, m: Tensor | None = None, causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(q, q + 1, q * 2, attn_mask=m, is_causal=causal)


def eager(q: Tensor, m: Tensor | None = None, causal: bool = False) -> Tensor:
    scores = q @ (q + 1).transpose(-1, -2) / D**0.5
    if causal:
        m = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    if m is not None and m.dtype == torch.bool:
        scores = scores.masked_fill(~m, float("-inf"))
    elif m is not None:
        scores = scores + m
    return scores.softmax(-1) @ (q * 2)


def truth(q: Tensor, keep: Tensor, empty_rows: str = "zero") -> Tensor:
    q = q.double()
    keep = keep.broadcast_to(B, H, q.shape[2], q.shape[2])
    return reference(q, q + 1, q * 2, keep, empty_rows=empty_rows)[0]


def causal_mask(n: int = N) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


class Plain(nn.Module):
    """An attention with a parameter, as in a model."""

    def __init__(self, kind: Callable[..., Tensor] = sdpa, causal: bool = False) -> None:
        super().__init__()
        self.kind, self.causal = kind, causal
        self.factor = nn.Parameter(torch.tensor(1.5))

    def forward(self, q: Tensor, m: Tensor | None = None) -> Tensor:
        return self.kind(q * self.factor, m, self.causal)


class Layers(nn.Module):
    def __init__(self, *layers: nn.Module, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers, self.checkpointed = nn.ModuleList(layers), checkpointed

    def forward(self, q: Tensor) -> Tensor:
        for layer in self.layers:
            q = checkpoint(layer, q, use_reentrant=False) if self.checkpointed else layer(q)
        return q


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def queries(n: int = N) -> Tensor:
    return torch.randn(B, H, n, D)


def compiled(fn: Callable[..., Any], inductor: bool = False, **options: Any) -> Callable[..., Any]:
    """The rewritten program; Inductor only where a test is about it, since it takes its time."""
    if inductor:
        return torch.compile(fn, backend="sparse_compile", fullgraph=True, options=options or None)
    return torch.compile(fn, backend=_rewritten(**options), fullgraph=True)


def _rewritten(**options: Any) -> Any:
    from torch._dynamo.backends.debugging import aot_eager

    from sparse_compile.options import Options
    from sparse_compile.passes import pipeline

    def rewrite(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        pipeline.run(gm, example_inputs, Options.parse(options))
        return aot_eager(gm, example_inputs)

    return rewrite


def agrees(
    fn: Callable[..., Any], q: Tensor, keep: Tensor, *args: Any, factor: float = 1.5
) -> None:
    assert relative_error(compiled(fn)(q, *args), truth(q * factor, keep)) < 1e-5


# ---- restrict -------------------------------------------------------------------------------


def on_class(kind: Callable[..., Tensor], causal: bool) -> Callable[..., Tensor]:
    @mask(WINDOW)
    class Block(Plain):
        pass

    assert Plain.forward is not Block.forward
    return Block(kind, causal)


def on_module(kind: Callable[..., Tensor], causal: bool) -> Callable[..., Tensor]:
    module = Plain(kind, causal)
    assert mask(module, WINDOW) is module
    return module


def on_module_inside(kind: Callable[..., Tensor], causal: bool) -> Callable[..., Tensor]:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = mask(WINDOW)(Plain(kind, causal))

        def forward(self, q: Tensor, m: Tensor | None = None) -> Tensor:
            return self.attn(q, m)

    return Around()


def on_method(kind: Callable[..., Tensor], causal: bool) -> Callable[..., Tensor]:
    class Block(nn.Module):
        def forward(self, q: Tensor, m: Tensor | None = None) -> Tensor:
            return self.attend(q * 1.5, m)

        @mask(WINDOW)
        def attend(self, q: Tensor, m: Tensor | None = None) -> Tensor:
            return kind(q, m, causal)

    return Block()


def on_function(kind: Callable[..., Tensor], causal: bool) -> Callable[..., Tensor]:
    @mask(WINDOW)
    def attend(q: Tensor, m: Tensor | None = None) -> Tensor:
        return kind(q * 1.5, m, causal)

    return attend


PLACES = [on_class, on_module, on_module_inside, on_method, on_function]


@pytest.mark.parametrize(
    ("place", "kind", "causal"),
    [  # every pair
        (place, kind, (i + j) % 2 == 1)
        for i, place in enumerate(PLACES)
        for j, kind in enumerate([sdpa, eager])
    ],
)
def test_restrict(place: Callable[..., Any], kind: Callable[..., Tensor], causal: bool) -> None:
    q, keep = queries(), WINDOW.dense(N, N)
    agrees(place(kind, causal), q, keep & causal_mask() if causal else keep)


@pytest.mark.parametrize("kind", [sdpa, eager])
def test_restrict_is_anded_with_a_mask_of_the_code(kind: Callable[..., Tensor]) -> None:
    @mask(WINDOW)
    def attend(q: Tensor, padding: Tensor) -> Tensor:
        return kind(q, padding[:, None, None, :] & causal_mask(q.shape[2]))

    padding = torch.arange(N)[None] < torch.tensor([[N], [N - 7]])
    keep = WINDOW.dense(N, N) & causal_mask() & padding[:, None, None]
    q = queries()
    ours = compiled(attend)(q, padding)
    # Queries that the restriction leaves empty yield what the code gives for a fully padded one.
    assert not keep.any(-1).all()
    wanted = truth(q, keep, "zero" if kind is sdpa else "nan")
    assert relative_error(ours, wanted) < 1e-5


def test_restrict_to_causal_tells_sdpa() -> None:
    module = mask(Plain(), P.Causal())
    agrees(module, queries(), causal_mask())
    site = sparse_compile.explain(module, queries()).sites[0]
    assert (site.executor, site.mask) == ("sdpa", "kv <= q")


def test_a_vacuous_restriction_leaves_the_call_alone() -> None:
    module = mask(Plain(causal=True), P.Causal())
    agrees(module, queries(), causal_mask())
    site = sparse_compile.explain(module, queries()).sites[0]
    assert not site.rewritten
    assert site.annotation == "restrict Causal(), on class Plain"


def test_without_the_backend_nothing_changes() -> None:
    q = queries()
    for place in PLACES:
        assert torch.equal(place(sdpa, False)(q), sdpa(q * 1.5))
    other = torch.compile(on_function(sdpa, False), backend="eager", fullgraph=True)
    assert torch.equal(other(q), sdpa(q * 1.5))


# ---- nesting --------------------------------------------------------------------------------


def test_a_function_inside_a_module_wins() -> None:
    inner = mask(OTHER)(sdpa)
    outer = mask(WINDOW)(lambda q: inner(q) + sdpa(q))
    q = queries()
    wanted = truth(q, OTHER.dense(N, N)) + truth(q, WINDOW.dense(N, N))
    assert relative_error(compiled(outer)(q), wanted) < 1e-5
    module = mask(Plain(lambda q, m, causal: inner(q)), WINDOW)
    agrees(module, q, OTHER.dense(N, N))


def test_a_module_inside_a_function_or_a_module_wins() -> None:
    q, module = queries(), mask(Plain(), OTHER)
    agrees(mask(WINDOW)(lambda q: module(q)), q, OTHER.dense(N, N))
    agrees(mask(Layers(module), WINDOW), q, OTHER.dense(N, N))


def test_a_module_wins_over_its_class_and_the_last_call_over_earlier_ones() -> None:
    @mask(WINDOW)
    class Block(Plain):
        pass

    module, plain, q = Block(), Block(), queries()
    mask(module, P.Causal())
    mask(module, OTHER)
    agrees(module, q, OTHER.dense(N, N))
    agrees(plain, q, WINDOW.dense(N, N))


def test_an_annotation_after_compilation_counts() -> None:
    module, q = Plain(), queries()
    fast = compiled(module)
    assert relative_error(fast(q), truth(q * 1.5, torch.ones(N, N).bool())) < 1e-5
    mask(fast, WINDOW)
    assert relative_error(fast(q), truth(q * 1.5, WINDOW.dense(N, N))) < 1e-5


def test_copies_are_annotated_and_run_their_own_forward() -> None:
    module, q = mask(Plain(), WINDOW), queries()
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.factor.fill_(0.5)
    agrees(twin, q, WINDOW.dense(N, N), factor=0.5)
    agrees(module, q, WINDOW.dense(N, N))
    loaded = pickle.loads(pickle.dumps(module))
    assert torch.equal(loaded(q), module(q))


# ---- modes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("place", ["class", "module"])
def test_training(place: str, checkpointed: bool) -> None:
    @mask(WINDOW)
    class Block(Plain):
        pass

    layers = [Block() if place == "class" else mask(Plain(), WINDOW), Plain()]
    model = Layers(*layers, checkpointed=checkpointed)
    q = queries().requires_grad_()
    ours = compiled(model, inductor=checkpointed)(q)
    grads = torch.autograd.grad(ours.square().sum(), [q, layers[0].factor, layers[1].factor])
    exact = [t.detach().double().requires_grad_() for t in (q, layers[0].factor, layers[1].factor)]
    hidden = truth(exact[0] * exact[1], WINDOW.dense(N, N))
    wanted = truth(hidden * exact[2], torch.ones(N, N).bool())
    wanted_grads = torch.autograd.grad(wanted.square().sum(), exact)
    assert relative_error(ours, wanted) < 1e-5
    for ours_grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert relative_error(ours_grad, wanted_grad) < 1e-5


def test_an_annotation_around_a_checkpoint_reaches_inside() -> None:
    model = mask(Layers(Plain(), checkpointed=True), WINDOW)
    q = queries().requires_grad_()
    assert relative_error(compiled(model)(q), truth(q * 1.5, WINDOW.dense(N, N))) < 1e-5


@pytest.mark.parametrize("pattern", [WINDOW, P.Random(block=8, random=2, seed=0)])
def test_dynamic_lengths(pattern: P.Pattern) -> None:
    counter = CompileCounterWithBackend("sparse_compile")
    fast = torch.compile(mask(pattern)(sdpa), backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for n in (40, 56, 72):
            q = queries(n)
            assert relative_error(fast(q), truth(q, pattern.dense(n, n))) < 1e-5
    assert counter.frame_count == 1


# ---- tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize("inductor", [False, True])
def test_tables_are_read_in_each_call(inductor: bool) -> None:
    ids = (torch.arange(N) // 10).repeat(B, 1)
    lengths = torch.tensor([N, N - 7])
    pattern = P.Documents(ids) & P.Padding(lengths)
    counter = CompileCounterWithBackend("sparse_compile" if inductor else _rewritten())
    model = Layers(*(mask(Plain(), pattern) for _ in range(2)))
    fast = torch.compile(model, backend=counter, fullgraph=True)
    q = queries().requires_grad_()
    for width in (10, 20):
        ids.copy_((torch.arange(N) // width).repeat(B, 1))
        lengths.copy_(torch.tensor([N - width, N]))
        ours = fast(q)
        keep = pattern.dense(N, N, B, H)
        (grad,) = torch.autograd.grad(ours.square().sum(), q)
        exact = q.detach().double().requires_grad_()
        wanted = truth(truth(exact * 1.5, keep) * 1.5, keep)
        (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), exact)
        assert relative_error(ours, wanted) < 1e-5
        assert relative_error(grad, wanted_grad) < 1e-5
    assert counter.frame_count == 1


def test_the_backward_uses_the_values_of_the_forward() -> None:
    ids = torch.arange(N) // 10
    q = queries().requires_grad_()
    ours = compiled(mask(P.Documents(ids))(sdpa))(q)
    keep = P.Documents(ids.clone()).dense(N, N)
    ids.zero_()
    (grad,) = torch.autograd.grad(ours.square().sum(), q)
    exact = q.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(truth(exact, keep).square().sum(), exact)
    assert relative_error(grad, wanted) < 1e-5


def test_tables_of_the_code_and_of_the_pattern_meet() -> None:
    ids = torch.arange(N) // 8

    @mask(P.Documents(ids) | P.Global(2))
    def attend(q: Tensor, padding: Tensor) -> Tensor:
        return sdpa(q, padding[:, None, None, :])

    padding = torch.arange(N)[None] < torch.tensor([[N], [N - 3]])
    q = queries()
    keep = (P.Documents(ids) | P.Global(2)).dense(N, N) & padding[:, None, None]
    assert relative_error(compiled(attend)(q, padding), truth(q, keep)) < 1e-5
    report = sparse_compile.explain(attend, q, padding)
    assert report.sites[0].density == pytest.approx(keep.double().mean().item())


def test_layers_share_tables_and_layouts() -> None:
    from sparse_compile.options import Options
    from sparse_compile.passes import pipeline

    @mask(P.Documents(torch.arange(N) // 10))
    class Block(Plain):
        pass

    def look(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        pipeline.run(gm, example_inputs, Options(decide="sparse"))
        targets = [str(node.target) for node in gm.graph.nodes]
        for name, times in (("pattern_table", 1), (".layout.", 1), (".attention.", 3)):
            assert sum(name in target for target in targets) == times
        return gm

    torch.compile(Layers(Block(), Block(), Block()), backend=look, fullgraph=True)(queries())


# ---- promise --------------------------------------------------------------------------------


def additive(keep: Tensor) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("spell", [lambda keep: keep, additive])
@pytest.mark.parametrize("kind", [sdpa, eager])
def test_promise(kind: Callable[..., Tensor], spell: Callable[[Tensor], Tensor]) -> None:
    keep = WINDOW.dense(N, N)
    module = mask(Plain(kind), WINDOW, promise=True)
    q = queries()
    agrees(module, q, keep, spell(keep))
    checked = compiled(module, check_promises=True)(q, spell(keep))
    assert relative_error(checked, truth(q * 1.5, keep)) < 1e-5
    site = sparse_compile.explain(module, q, spell(keep)).sites[0]
    assert site.rewritten
    assert site.annotation == "promise SlidingWindow(5, right=2), on class Plain"


def test_promise_with_tables_and_training() -> None:
    ids = torch.arange(N) // 10
    attend = mask(P.Documents(ids), promise=True)(sdpa)
    q = queries().requires_grad_()
    keep = P.Documents(ids).dense(N, N)
    ours = compiled(attend, check_promises=True)(q, keep)
    (grad,) = torch.autograd.grad(ours.square().sum(), q)
    exact = q.detach().double().requires_grad_()
    wanted = truth(exact, keep)
    (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), exact)
    assert relative_error(ours, wanted) < 1e-5
    assert relative_error(grad, wanted_grad) < 1e-5


def test_promise_keeps_what_the_program_gives_an_empty_query() -> None:
    pattern = P.Padding(torch.tensor([N, 0]))
    keep = pattern.dense(N, N, B, H)
    q = queries()
    assert compiled(mask(pattern, promise=True)(sdpa))(q, keep)[1].eq(0).all()
    assert compiled(mask(pattern, promise=True)(eager))(q, keep)[1].isnan().all()


@pytest.mark.parametrize("spell", [lambda keep: keep, additive])
def test_a_broken_promise_is_found(spell: Callable[[Tensor], Tensor]) -> None:
    fast = compiled(mask(WINDOW, promise=True)(sdpa), inductor=True, check_promises=True)
    keep = WINDOW.dense(N, N).broadcast_to(B, H, N, N).clone()
    fast(queries(), spell(keep))
    keep[1, 1, 30, 29:31] = False
    keep[1, 1, 31, 0] = True
    with pytest.raises(BrokenPromise) as caught:
        fast(queries(), spell(keep))
    message = str(caught.value)
    assert "promise of SlidingWindow(5, right=2) on function sdpa, test_annotations.py:" in message
    assert "at (b=1, h=1, q=30, kv=29) the mask hides this pair" in message


def test_a_promised_bias_is_no_mask() -> None:
    fast = compiled(mask(WINDOW, promise=True)(sdpa), check_promises=True)
    bias = additive(WINDOW.dense(N, N))
    bias[0, 0, 3, 3] = 0.25
    with pytest.raises(BrokenPromise, match=r"adds 0\.25 to a score"):
        fast(queries(), bias)


def test_a_promise_about_a_mask_that_the_code_does_not_pass() -> None:
    module = mask(Plain(causal=True), P.Causal() & WINDOW, promise=True)
    agrees(module, queries(), causal_mask())  # what the code does is known: it is causal
    agrees(mask(Plain(), P.Causal(), promise=True), queries(), torch.ones(N, N).bool())


# ---- explain and errors ---------------------------------------------------------------------


def test_explain_names_the_annotation_that_applies() -> None:
    @mask(P.SlidingWindow(3, 0))
    class Block(Plain):
        pass

    model = Layers(Block(), Block(), mask(Block(), OTHER), Plain())
    report = sparse_compile.explain(model, queries())
    notes = [site.annotation for site in report.sites]
    on_block = "restrict SlidingWindow(3, right=0), on class Block"
    on_layer = "restrict SlidingWindow(1, right=0), on layers.2 (class Block)"
    assert notes == [on_block, on_block, on_layer, None]
    assert f"\n    annotated   {on_block}\n" in str(report)
    assert [site.where.split(",")[0] for site in report.sites][:2] == ["layers.0", "layers.1"]
    assert "annotate.py" not in str(report)


def test_a_pattern_that_does_not_fit() -> None:
    module = mask(Plain(), P.Documents(torch.zeros(N + 1, dtype=torch.int64)))
    with pytest.raises(BadPattern) as plain:
        sparse_compile.explain(module, queries())
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as wrapped:
        compiled(module)(queries())
    assert isinstance(wrapped.value.inner_exception, BadPattern)
    assert str(plain.value) in str(wrapped.value)


def test_a_restriction_that_cannot_be_honoured() -> None:
    @mask(WINDOW)
    def attend(q: Tensor) -> Tensor:
        return (q @ q.mT).softmax(-2) @ q

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compiled(attend)(queries())
    assert isinstance(caught.value.inner_exception, RestrictionFailed)
    message = str(caught.value.inner_exception)
    assert "restrict SlidingWindow(5, right=2), on function test_a_restrict" not in message
    assert "restrict SlidingWindow(5, right=2), on function attend cannot be honoured" in message
    assert "over the queries" in message
    site = sparse_compile.explain(attend, queries()).sites[0]
    assert (site.rewritten, site.annotation) == (
        False,
        "restrict SlidingWindow(5, right=2), on function attend",
    )


def test_a_graph_break_inside_is_told() -> None:
    def attend(q: Tensor) -> Tensor:
        q = q + 1
        torch._dynamo.graph_break()
        return sdpa(q)

    with pytest.warns(UserWarning, match=r"a graph break inside function attend separates"):
        torch.compile(mask(WINDOW)(attend), backend=_rewritten())(queries())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mask("causal"), "'causal', which is no pattern. Write one of"),
        (lambda: mask(P.Causal), "which is no pattern"),
        (lambda: mask(), "got 0 arguments"),
        (lambda: mask(WINDOW, Plain()), "got the pattern first"),
        (lambda: mask(Plain(), WINDOW, promise=1), "promise=1): write True or False"),
        (lambda: mask(WINDOW)(3), "cannot annotate 3"),
        (lambda: mask(WINDOW)(int), "cannot annotate <class 'int'>"),
        (lambda: mask(WINDOW)(nn.ModuleList()), "ModuleList, which has no forward"),
    ],
)
def test_misuse(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(PatternMisuse) as caught:
        call()
    assert message in str(caught.value)
    assert str(caught.value).startswith("sparse_compile: ")


def test_check_promises_is_validated() -> None:
    with pytest.raises(BadOption, match="check_promises=1 is not valid"):
        sparse_compile.Options.parse({"check_promises": 1})


def test_the_operators_are_well_formed() -> None:
    from sparse_compile.ops.pattern import CHECK_PROMISE, promise_plan
    from sparse_compile.sites.annotation import Annotation

    note = Annotation(WINDOW, promise=True, target="a test")
    plan = promise_plan(["keep"], ["b", "h", "q", "kv"], causal=False, shown="a test")
    q = queries().requires_grad_()
    torch.library.opcheck(CHECK_PROMISE, (q, [WINDOW.dense(N, N)], N, note.key, plan))

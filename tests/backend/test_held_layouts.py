"""Layouts of known sizes are buffers of the graph, so that CUDA graphs record whole models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import checkpoint

import sparse_compile
from sparse_compile import patterns as P
from sparse_compile.options import Options
from sparse_compile.passes import pipeline
from tests.tolerance import relative_error

N, D = 256, 16
SPARSE = Options.parse({"decide": "sparse"})


def window(n: int, width: int = 40) -> Tensor:
    i = torch.arange(n)
    return (i[:, None] >= i) & (i[:, None] - i < width)


class Model(nn.Module):
    """Two layers that share a mask, and one of another."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.project = nn.Linear(D, D)
        self.checkpointed = checkpointed

    def layer(self, x: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.project(x), x, x, attn_mask=mask)

    def forward(self, x: Tensor) -> Tensor:
        wide, narrow = window(x.shape[2]), window(x.shape[2], 8)
        for mask in (wide, narrow, wide):
            if self.checkpointed:
                x = x + checkpoint(self.layer, x, mask, use_reentrant=False)
            else:
                x = x + self.layer(x, mask)
        return x


class Called(Model):
    """The same, by ``attention()``."""

    def forward(self, x: Tensor) -> Tensor:
        for width in (40, 8, 40):
            pattern = P.SlidingWindow(width - 1, 0)
            x = x + sparse_compile.attention(self.project(x), x, x, pattern)
        return x


class Seen:
    """Compiles with this library's passes and AOTAutograd, and keeps the graphs."""

    def __init__(self) -> None:
        self.captured: list[GraphModule] = []
        self.lowered: list[GraphModule] = []

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        pipeline.run(gm, inputs, SPARSE)
        self.captured.append(gm)

        def lower(graph: GraphModule, _: Sequence[Any]) -> Any:
            self.lowered.append(graph)
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=lower, bw_compiler=lower)(gm, inputs)

    @property
    def calls(self) -> list[Node]:
        return [n for gm in self.lowered for n in gm.graph.nodes if n.op == "call_function"]


def train(model: nn.Module, run: Callable[[Tensor], Tensor], n: int = N) -> list[Tensor]:
    """The output and the gradients of a step."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, n, D, requires_grad=True)
    out = run(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


def agrees(model: nn.Module, run: Callable[[Tensor], Tensor], n: int = N) -> None:
    exact = [t.detach() for t in train(model, model, n)]
    for found, wanted in zip(train(model, run, n), exact, strict=True):
        assert relative_error(found, wanted.double()) < 1e-5


MODELS = {
    "plain": Model,
    "checkpointed": lambda: Model(checkpointed=True),
    "called": Called,
}
UNSAFE = torch.Tag.cudagraph_unsafe


@pytest.mark.parametrize("name", MODELS)
def test_layouts_of_known_sizes_are_inputs_of_what_inductor_gets(name: str) -> None:
    model, seen = MODELS[name](), Seen()
    agrees(model, torch.compile(model, backend=seen, fullgraph=True))
    (captured,) = seen.captured
    buffers = dict(captured.named_buffers())
    assert len(buffers) == 2  # one for each mask, whatever the number of layers
    forward, backward = seen.lowered
    ours = [call for call in seen.calls if "sparse_compile" in str(call.target)]
    names = {call.target._opname for call in ours}
    assert names == {"attention", "attention_backward"}
    assert not any(UNSAFE in call.target.tags for call in ours)
    # AOTAutograd lifted them: to inputs, which the backward gets as what it saved.
    for graph in (forward, backward):
        holders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        lists = [node for node in holders if node.meta["val"].dtype == torch.int32]
        assert len(lists) == 2
        assert not graph.graph.find_nodes(op="get_attr")


class Annotated(nn.Module):
    """Two layers, the mask of which a pattern says."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + F.scaled_dot_product_attention(self.project(x), x, x)
        return x


class Masked(Annotated):
    """The same, with a mask tensor."""

    def __init__(self, pattern: P.Pattern) -> None:
        super().__init__()
        self.pattern = pattern

    def forward(self, x: Tensor) -> Tensor:
        mask = self.pattern.dense(x.shape[2], x.shape[2])
        for _ in range(2):
            x = x + F.scaled_dot_product_attention(self.project(x), x, x, attn_mask=mask)
        return x


ENDS = (0, 70, 200, N)
FIXED = {
    "random": P.Random(32, 2, seed=1) | P.BlockLocal(16),
    "bigbird": P.BigBird(32, random=1, global_=1, window=1),
    "documents": P.Documents(cu_seqlens=ENDS) & P.Causal(),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_a_fixed_pattern_makes_is_held_as_well(name: str) -> None:
    model, masked, seen = Annotated(), Masked(FIXED[name]), Seen()
    masked.load_state_dict(model.state_dict())
    run = torch.compile(sparse_compile.mask(model, FIXED[name]), backend=seen, fullgraph=True)
    for found, wanted in zip(train(model, run), train(masked, masked), strict=True):
        assert relative_error(found, wanted.double()) < 1e-5
    ours = {c.target._opname for c in seen.calls if "sparse_compile" in str(c.target)}
    assert ours == {"attention", "attention_backward"}


def test_patterns_that_differ_in_a_seed_are_told_apart() -> None:
    """Graphs of them are alike, but for what they hold."""
    run = torch.compile(sparse_compile.attention, backend=Seen())
    q = torch.randn(1, 2, N, D)
    for seed in (0, 1, 0):
        pattern = P.Random(32, 2, seed=seed)
        wanted = F.scaled_dot_product_attention(q, q, q, attn_mask=pattern.dense(N, N))
        assert relative_error(run(q, q, q, pattern), wanted.double()) < 1e-5


def test_a_pattern_of_a_tensor_is_read_in_each_call() -> None:
    ends = torch.tensor(ENDS)
    pattern = P.Documents(cu_seqlens=ends) & P.Causal()
    model, masked, seen = Annotated(), Masked(pattern), Seen()
    masked.load_state_dict(model.state_dict())
    run = torch.compile(sparse_compile.mask(model, pattern), backend=seen, fullgraph=True)
    for middle in (70, 130):
        ends[1] = middle
        for found, wanted in zip(train(model, run), train(masked, masked), strict=True):
            assert relative_error(found, wanted.double()) < 1e-5
    assert len(seen.captured) == 1
    assert not list(seen.captured[0].buffers())


def test_a_fixed_pattern_at_lengths_that_change_is_made_in_each_call() -> None:
    pattern = FIXED["random"]
    model, masked, seen = Annotated(), Masked(pattern), Seen()
    masked.load_state_dict(model.state_dict())
    run = torch.compile(sparse_compile.mask(model, pattern), backend=seen, dynamic=True)
    for n in (N, N + 72):
        for found, wanted in zip(train(model, run, n), train(masked, masked, n), strict=True):
            assert relative_error(found, wanted.double()) < 1e-5
    assert "pattern_table" in {getattr(c.target, "_opname", "") for c in seen.calls}


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param("plain", "sparse_compile", marks=pytest.mark.inductor),
        *((name, "seen") for name in MODELS),
    ],
)
def test_dynamic_lengths_keep_the_operator(name: str, backend: str) -> None:
    model, seen = MODELS[name](), Seen()
    if backend == "seen":
        run = torch.compile(model, backend=seen, fullgraph=True, dynamic=True)
    else:
        options = {"decide": "sparse"}
        run = torch.compile(model, backend=backend, dynamic=True, options=options)
    for n in (N, N + 72, N + 5):
        agrees(model, run, n)
    if backend == "seen":
        (captured,) = seen.captured
        assert not list(captured.buffers())
        unsafe = {c.target._opname for c in seen.calls if UNSAFE in getattr(c.target, "tags", ())}
        assert unsafe == {"layout"}


@pytest.mark.inductor
@pytest.mark.parametrize("name", ["checkpointed", "called"])  # a plain one fills the caches below
def test_through_inductor(name: str) -> None:
    model = MODELS[name]()
    options = {"decide": "sparse"}
    agrees(model, torch.compile(model, backend="sparse_compile", options=options))


def test_a_graph_finds_its_layouts_in_inference_and_training() -> None:
    """What is built while a model is compiled for inference may be saved for a backward."""
    model = Model()
    run = torch.compile(model, backend="sparse_compile", options={"decide": "sparse"})
    with torch.inference_mode():
        run(torch.randn(1, 2, N, D))
    agrees(model, run)


@pytest.mark.inductor
def test_caches_of_compiled_graphs_take_the_buffers() -> None:
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_inductor_cache

    options = {"decide": "sparse"}
    with fresh_inductor_cache(), torch._functorch.config.patch(enable_autograd_cache=True):
        for expected in ("autograd_cache_miss", "autograd_cache_hit"):
            torch._dynamo.reset()
            counters.clear()
            model = Model()
            agrees(model, torch.compile(model, backend="sparse_compile", options=options))
            assert counters["aot_autograd"][expected] == 1, counters["aot_autograd"]

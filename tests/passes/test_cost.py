"""What is predicted, and what is decided by it: never slower than what was replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

import sparse_compile
from sparse_compile import patterns as P
from sparse_compile.layout.cost import Coverage, Workload, blocks, cheapest, dense, lists
from sparse_compile.options import Options
from sparse_compile.passes import pipeline
from sparse_compile.sites.plan import Plan, Trace
from sparse_compile.spec.target import Target

H200, CPU = Target("cuda", "sm_90", 132), Target("cpu", "interpreter", 1)


def window(size: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = k.shape[2]
        i = torch.arange(t - q.shape[2], t)[:, None]
        j = torch.arange(t)[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & (j > i - size))

    return program


def given(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def operands(batch: int, heads: int, n: int, n_kv: int = 0, dim: int = 64) -> list[Tensor]:
    return [torch.randn(batch, heads, m, dim) for m in (n, n_kv or n, n_kv or n)]


def is_rewritten(program: Callable[..., Any], *args: Tensor) -> bool:
    torch._dynamo.reset()
    (site,) = sparse_compile.explain(program, *args).sites
    return site.rewritten


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("batch", "n"), [(1, 256), (8, 256), (1, 1024), (8, 2048), (1, 16384)])
def test_windows_on_an_h200(batch: int, n: int, trained: bool) -> None:
    """As measured: a window of 128, 16 heads of 64: calls cost the host as much as SDPA's."""
    assert _taken(batch, n, trained, Coverage(192)) == "block-sparse"


@pytest.mark.parametrize("trained", [False, True])
def test_short_problems_on_an_h200(trained: bool) -> None:
    """The layout is made in each call, or that does more than to start its kernels."""
    assert _taken(1, 1024, trained, Coverage(192, made=1)) == "dense"
    assert _taken(1, 1024, trained, Coverage(192, more=True)) == "dense"
    assert _taken(8, 4096, trained, Coverage(192, more=True)) == "block-sparse"


@pytest.mark.parametrize("trained", [False, True])
def test_windows_of_images_on_an_h200(trained: bool) -> None:
    """As measured, Swin's 49 patches: SDPA's kernels take keys 128 at a time; ours have 64."""
    for windows, heads in ((4096, 4), (1024, 8), (256, 16), (64, 32)):
        work = Workload(windows, heads, 49, 49, 64, trained, added=windows * heads * 49 * 49)
        ours = blocks(H200, work, Coverage(64, scored=True))
        assert cheapest([dense(H200, work), ours]) is ours


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("batch", [1, 8])
def test_scattered_edges_on_an_h200(batch: int, trained: bool) -> None:
    """As measured, 4096 tokens: nearly all blocks are visited, each pair looked up."""
    scattered = Coverage(3564, made=1, read=4096**2, looked_up=3564)
    assert _taken(batch, 4096, trained, scattered) == "dense"
    measured = {(1, False): 3.0, (1, True): 4.8, (8, False): 13.3, (8, True): 29.4}[batch, trained]
    work = Workload(batch, 16, 4096, 4096, 128, trained)
    assert measured / 1.3 < blocks(H200, work, scattered).seconds * 1e3 < 1.3 * measured


def _taken(batch: int, n: int, trained: bool, coverage: Coverage) -> str:
    work = Workload(batch, 16, n, n, 128, trained)
    return cheapest([dense(H200, work), blocks(H200, work, coverage)]).name


@pytest.mark.parametrize("n_kv", [4096, 32768, 131072])
def test_a_token_on_an_h200(n_kv: int) -> None:
    """As measured: a window of 1024 whose position is a tensor, 32 heads of 128."""
    work = Workload(1, 32, 1, n_kv, 256)
    as_it_is, sparse = dense(H200, work), blocks(H200, work, Coverage(1088, made=1))
    assert cheapest([as_it_is, sparse]) is as_it_is
    measured = {4096: 0.10e-3, 32768: 0.25e-3, 131072: 0.96e-3}[n_kv]
    assert measured / 2 < as_it_is.seconds < 2 * measured
    assert 1.7e-3 < sparse.seconds < 2.4e-3


@pytest.mark.parametrize("target", [H200, CPU])
def test_predictions_follow_what_there_is_to_do(target: Target) -> None:
    work, longer = Workload(1, 8, 1024, 1024, 128), Workload(1, 8, 1024, 4096, 128)
    assert dense(target, longer).seconds > dense(target, work).seconds
    assert blocks(target, longer, Coverage(64)) == blocks(target, work, Coverage(64))
    once, often = blocks(target, work, Coverage(64)), blocks(target, work, Coverage(64, made=1))
    assert once.seconds < often.seconds
    assert lists(target, work, 16).seconds < lists(target, work, 512).seconds
    more = Target(target.kind, target.arch, 2 * target.workers)
    assert dense(more, work).seconds < dense(target, work).seconds


@pytest.mark.priced
def test_a_short_problem_is_left_alone_and_told() -> None:
    args = operands(1, 4, 128)
    report = sparse_compile.explain(window(32), *args)
    (site,) = report.sites
    assert not site.rewritten
    assert "predicted to be faster on cpu: dense" in site.reason
    assert "block-sparse" in site.reason
    assert '{"decide": "sparse"}' in site.hint
    forced = sparse_compile.explain_with({"decide": "sparse"})(window(32), *args)
    assert forced.rewritten == 1


@pytest.mark.priced
def test_a_long_problem_is_rewritten() -> None:
    assert is_rewritten(window(32), *operands(1, 4, 1024))


@pytest.mark.priced
def test_small_windows_and_scattered_edges_are_left_alone() -> None:
    random = torch.Generator().manual_seed(0)
    kept = (torch.rand(32, 1, 1, 64, generator=random) < 0.6) | torch.eye(64, dtype=torch.bool)
    assert not is_rewritten(given, *operands(32, 4, 64, dim=32), kept)
    edges = (torch.rand(1024, 1024, generator=random) < 8 / 1024) | torch.eye(1024).bool()
    assert not is_rewritten(given, *operands(1, 4, 1024), edges)


@pytest.mark.priced
def test_what_a_mask_tensor_holds_decides() -> None:
    """The same shapes: one tensor skips nearly everything, the other nothing."""
    block = torch.arange(2048) // 64
    args = operands(1, 4, 2048)
    assert is_rewritten(given, *args, block[:, None] == block)
    assert not is_rewritten(given, *args, torch.arange(2048)[:, None] % 7 != torch.arange(2048))


@pytest.mark.priced
def test_a_token_of_generation_is_left_alone() -> None:
    def static_cache(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        j = torch.arange(k.shape[2])
        return given(q, k, v, ((j <= at) & (j > at - 64))[None])

    q, k, v = operands(1, 4, 1, 2048)
    assert not is_rewritten(static_cache, q, k, v, torch.tensor(2047))


@pytest.mark.priced
def test_a_restriction_is_honoured_however_short_the_problem() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    args = operands(1, 2, 64)
    model = sparse_compile.mask(P.SlidingWindow(7, 0))(Attend())
    out = torch.compile(model, backend="sparse_compile")(*args)
    torch.testing.assert_close(out, window(8)(*args))


class Counted:
    """A backend that decides as ours does and runs the rewritten graph as it is."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.traces += pipeline.run(gm, inputs, Options())
        return gm.forward

    @property
    def sparse(self) -> list[bool]:
        return [isinstance(trace.decision, Plan) for trace in self.traces]


@pytest.mark.priced
def test_a_growing_cache_has_two_graphs() -> None:
    """Below some length it is left alone, beyond it is rewritten; nothing else compiles again."""
    torch._dynamo.reset()
    counted, program = Counted(), window(48)
    compiled = torch.compile(program, backend=counted)
    keys = torch.randn(1, 1, 20000, 64)

    def token(n: int) -> None:
        q, k = torch.randn(16, 8, 1, 64), keys[:, :, :n].expand(16, 8, n, 64)
        torch.testing.assert_close(compiled(q, k, k), program(q, k, k))

    for n in (100, 101, 102, 150):
        token(n)
    assert counted.sparse == [False, False]  # the first length, and any
    for n in (16000, 16001, 9000, 120, 17000, 200):
        token(n)
    assert counted.sparse == [False, False, True]


@pytest.mark.priced
def test_the_other_graph_comes_second() -> None:
    torch._dynamo.reset()
    counted = Counted()
    compiled = torch.compile(window(48), backend=counted, dynamic=True)
    for n in (2048, 3000, 100, 120, 2500, 80):
        compiled(*operands(1, 4, n, dim=16))
    assert counted.sparse == [True, False]


@pytest.mark.priced
@pytest.mark.parametrize("declared", [{}, {"min": 64, "max": 40000}])
def test_a_range_that_the_user_declares_stays_whole(declared: dict[str, int]) -> None:
    """There, the length that is compiled with decides."""
    torch._dynamo.reset()
    counted = Counted()
    compiled = torch.compile(window(48), backend=counted)
    for n in (3000, 100, 200):
        args = operands(1, 4, n, dim=16)
        for x in args:
            torch._dynamo.mark_dynamic(x, 2, **declared)
        compiled(*args)
    assert counted.sparse == ([True] if declared else [True, False])

"""explain and code on programs that call this library's attention, and those that are skipped."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

import sparse_compile
from sparse_compile import explain_with, native_sparse_attention
from sparse_compile import patterns as P
from sparse_compile.inspect.kernels import of_call
from sparse_compile.sites.named import NamedMask

N = 128
TOPK = P.Causal() & P.TopK(3, unit_kv=16)
COMPOSED = P.Causal() & (P.TopK(2, unit_kv=16) | P.SlidingWindow(5))
SETTINGS = P.NSA(length=8, stride=4, block=16, k=3, window=16)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def operands() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, 4, N, 16), torch.randn(1, 2, N, 16), torch.randn(1, 2, N, 16)


def calling(mask: P.Pattern | Tensor | None) -> Callable[..., Tensor]:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_compile.attention(q * 1.0, k, v, mask) + 0.0

    return program


def nsa(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    return native_sparse_attention(q, k, v, gates, SETTINGS) + 0.0


def explained(program: Callable[..., Any], *args: Tensor) -> Any:
    return explain_with({})(program, *args)


def test_a_window() -> None:
    (site,) = explained(calling(P.SlidingWindow(15, 0)), *operands()).sites
    assert site.rewritten
    assert site.mask == "kv <= q and q - kv <= 15"
    assert site.where.startswith("test_called.py")
    dense = P.SlidingWindow(15, 0).dense(N, N)
    assert site.density == pytest.approx(dense.float().mean().item())
    (kernel,) = of_call(calling(P.SlidingWindow(15, 0)), operands(), {})
    assert kernel.name.startswith("attention_")


def test_a_selection_shows_all_that_runs() -> None:
    (site,) = explained(calling(TOPK), *operands()).sites
    assert site.mask == "selected and kv <= q"
    assert site.selection == "TopK(3, unit_kv=16)"
    assert site.lists is not None
    found = of_call(calling(TOPK), operands(), {}, arch="sm_80")
    assert [kernel.name.split("_")[0] for kernel in found] == ["selected", "choose"]
    for kernel in found:
        ast.parse(kernel.source)
        assert "@triton.jit" in kernel.source


def test_a_selection_beside_a_window() -> None:
    (site,) = explained(calling(COMPOSED), *operands()).sites
    assert "selected and" in site.mask
    assert "static part" in site.reason
    found = of_call(calling(COMPOSED), operands(), {})
    assert [kernel.name.split("_")[0] for kernel in found] == ["attention", "selected", "choose"]


def test_native_sparse_attention_is_three() -> None:
    args = *operands(), torch.rand(1, 4, N, 3)
    sites = explained(nsa, *args).sites
    assert [site.mask for site in sites] == [
        "4 * kv + 7 <= q",
        "selected and kv <= q",
        "kv <= q and q - kv <= 15",
    ]
    assert sites[1].lists is not None
    names = [kernel.name.split("_")[0] for kernel in of_call(nsa, args, {})]
    assert names == ["attention", "selected", "attention"]


@pytest.mark.parametrize("kept", [0.3, 1.0])
def test_a_tensor_is_read_like_any_other(kept: float) -> None:
    mask = torch.rand(N, N) < kept
    (site,) = explained(calling(mask), *operands()).sites
    assert site.rewritten
    assert site.mask == f"tensor [1, 1, {N}, {N}]"


def test_views_are_those_for_the_real_sizes() -> None:
    q = torch.randn(1, 1, 2048, 16)
    (site,) = explained(calling(P.Causal() & P.Strided(32)), q, q, q).sites
    assert site.views
    assert site.cost


MASKS: list[P.Pattern | None] = [None, P.Causal(), P.SlidingWindow(9)]
MASKS += [TOPK, COMPOSED, P.Documents(torch.arange(N) // 40)]


@pytest.mark.parametrize(
    ("mask", "dynamic", "backend"),
    [  # every pair
        (mask, (i + j) % 2 == 1, backend)
        for i, mask in enumerate(MASKS)
        for j, backend in enumerate(["eager", "aot_eager", "sparse"])
    ],
)
def test_one_node_for_any_backend(mask: P.Pattern, dynamic: bool, backend: str) -> None:
    seen: list[list[str]] = []

    def look(gm: GraphModule, inputs: Any) -> Any:
        seen.append([str(node.target) for node in gm.graph.nodes])
        if backend == "sparse":
            from sparse_compile.options import Options
            from sparse_compile.passes import pipeline

            pipeline.run(gm, inputs, Options())
            assert "masked_attention" not in str(gm.graph)
        return gm.forward if backend == "eager" else aot_autograd(fw_compiler=_boxed)(gm, inputs)

    q, k, v = operands()
    expected = sparse_compile.attention(q, k, v, mask)
    fast = torch.compile(sparse_compile.attention, backend=look, fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(fast(q.requires_grad_(), k, v, mask), expected)
    assert [name for name in seen[0] if "sparse_compile" in name] == [
        "sparse_compile.masked_attention.default"
    ]


def _boxed(gm: GraphModule, _: Any) -> Any:
    from functorch.compile import make_boxed_func

    return make_boxed_func(gm.forward)


def test_the_text_of_a_mask_says_all() -> None:
    from sparse_compile.api.plan import name_of

    text = name_of(COMPOSED, [])
    named = NamedMask.parse(text)
    assert named.text == text
    assert named.static is not None
    assert named.selected is not None
    assert named.units == (1, 16)
    assert name_of(P.Causal() & (P.TopK(2, unit_kv=16) | P.SlidingWindow(5)), []) == text


def test_a_restricted_call() -> None:
    @sparse_compile.mask(P.Causal())
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_compile.attention(q, k, v, P.SlidingWindow(15, 0)) + 0.0

    (site,) = explained(program, *operands()).sites
    assert site.rewritten
    assert site.mask == "kv <= q and q - kv <= 15"


def test_a_skipped_frame_is_named() -> None:
    def looping(q: Tensor) -> Tensor:
        for _ in range(2):
            q = F.scaled_dot_product_attention(q, q, q) * math.e
            torch._dynamo.graph_break()
        return q

    report = explained(looping, operands()[0])
    assert report.graphs == 0
    (frame,) = report.skipped
    assert frame.startswith("looping, test_called.py:")
    assert f"torch.compile skipped {frame}" in str(report)
    assert type(report).from_json(report.to_json()) == report

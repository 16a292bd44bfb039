"""Masks that select on a CUDA device: through attention(), compiled, and recognised in models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_compile
from sparse_compile import patterns as P
from sparse_compile.backend import backend
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.ops.indexer import INDEXED_TOPK
from sparse_compile.reference import attention as reference
from sparse_compile.selection.split import split
from sparse_compile.spec.indexer import IndexerSpec
from tests.gpu.waiting import no_waiting
from tests.selection.test_composition import _evaluate
from tests.tolerance import assert_close_as_eager, relative_error

DEVICE = torch.device("cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DOCUMENTS = P.Documents(torch.arange(300) // 130)


@dataclass(frozen=True)
class Case:
    """A mask, for heads and widths of a problem of 300 tokens and a batch of 2."""

    mask: P.Pattern
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (64, 64)
    n: int = 300

    def __str__(self) -> str:
        return f"{self.mask!r} {self.heads} {self.dims}"

    def operands(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and the gradient of the result."""
        generator = torch.Generator().manual_seed(0)
        (q_heads, kv_heads), (dim, value_dim) = self.heads, self.dims
        shapes = [(q_heads, dim), (kv_heads, dim), (kv_heads, value_dim), (q_heads, value_dim)]
        made = [torch.randn(2, h, self.n, d, generator=generator) for h, d in shapes]
        return [t.to(DEVICE, dtype) for t in made]

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """bool [2, Hq, N, N]: the mask as it is written, with what the library selects."""
        parts = split(self.mask)
        assert parts.selected is not None
        lengths = self.n, self.n, 2, self.heads[0]
        tables = parts.selected.tables(str(DEVICE), *lengths)
        found = parts.leaf.select(q, k, parts.selected.expr, tables, [])
        chosen = found.dense(self.n, self.n).cpu()
        chosen = chosen.repeat_interleave(self.heads[0] // chosen.shape[1], 1)
        seen = _evaluate(self.mask, chosen, self.heads[0], self.n, self.n)
        return seen.expand(2, self.heads[0], self.n, self.n).to(DEVICE)


CAUSAL, NEAR = P.Causal(), P.SlidingWindow(20, 0)
CASES = [
    Case(CAUSAL & P.TopK(3, unit_kv=16)),
    Case(CAUSAL & P.TopK(3, unit_kv=16) | NEAR),
    Case(CAUSAL & P.TopK(2, unit_kv=64, diagonal=True) | NEAR, (16, 1), (128, 128)),
    Case(CAUSAL & P.TopK(2, unit_kv=64, unit_q=64) | NEAR, (14, 2)),
    Case(CAUSAL & (P.TopK(1, unit_kv=128, unit_q=128) | P.Global(4) | NEAR), (4, 4), (128, 64)),
    Case(CAUSAL & P.TopK(30, unit_kv=1, scorer=P.MinMax(), share="all") | NEAR),
    Case(CAUSAL & P.TopK(30, unit_kv=1, share="none")),
    Case(CAUSAL & P.TopRatio(0.3, unit_kv=16, unit_q=16, sink=1) | NEAR, (6, 2)),
    Case(CAUSAL & P.TopP(0.5, unit_kv=32, scorer=P.OverlapPool(16, 8)) | NEAR),
    Case(CAUSAL & P.Threshold(0.1, unit_kv=16, unit_q=32, share="none") | NEAR),
    Case(CAUSAL & P.XAttention(16, 0.6, 64), (4, 2), (96, 96)),
    Case(CAUSAL & P.MoBA(64, 2)),
    Case(CAUSAL & P.NSASelection(64, 3) | NEAR, (16, 1)),
    Case(DOCUMENTS & CAUSAL & (P.TopK(2, unit_kv=16) | NEAR)),
    Case(P.TopK(3, unit_kv=16, unit_q=16) | P.SlidingWindow(9)),
]


def gradients(run: Callable[..., Tensor], operands: list[Tensor]) -> list[Tensor]:
    """The result, and the gradients of q, k and v."""
    *tensors, grad = operands
    inputs = [t.detach().requires_grad_() for t in tensors]
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def eager(mask: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Dense attention in the precision of its operands; 0 where nothing is seen."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -math.inf)
        some = mask.any(-1, keepdim=True)
        return torch.where(some, scores, 0).softmax(-1).where(some, 0) @ v

    return run


def exact(mask: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: reference(q, k, v, mask)[0]


def check(case: Case, dtype: torch.dtype, run: Callable[..., Tensor]) -> None:
    """Forward and all gradients, against the dense mask in fp64."""
    operands = case.operands(dtype)
    mask = case.dense(*operands[:2])
    found = gradients(lambda q, k, v: run(q, k, v, case.mask), operands)
    theirs = gradients(eager(mask), operands)
    wanted = gradients(exact(mask), [t.double() for t in operands])
    for name, *three in zip(("out", "dq", "dk", "dv"), found, theirs, wanted, strict=True):
        assert_close_as_eager(name, *three)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_dense_mask(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, sparse_compile.attention)


@pytest.mark.parametrize("case", [CASES[i] for i in (1, 3, 4, 8, 11, 13)], ids=str)
def test_in_compiled_code(case: Case) -> None:
    torch._dynamo.reset()

    def run(q: Tensor, k: Tensor, v: Tensor, mask: P.Pattern) -> Tensor:
        return sparse_compile.attention(q * 1.0, k, v, mask) + 0.0

    check(case, torch.bfloat16, torch.compile(run, backend=backend, fullgraph=True))


def test_nothing_waits() -> None:
    case = CASES[1]
    *tensors, grad = case.operands(torch.bfloat16)
    inputs = [t.requires_grad_() for t in tensors]

    def run() -> None:
        out = sparse_compile.attention(*inputs, mask=case.mask)
        torch.autograd.grad(out, inputs, grad)

    run()  # compiles
    with no_waiting():
        run()


def test_a_recorded_graph_selects_anew() -> None:
    case = CASES[1]
    q, k, v, _ = case.operands(torch.bfloat16)
    sparse_compile.attention(q, k, v, case.mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse_compile.attention(q, k, v, case.mask)
    for seed in range(3):
        torch.manual_seed(seed)
        q.copy_(torch.randn(q.shape))
        graph.replay()
        torch.testing.assert_close(out, sparse_compile.attention(q, k, v, case.mask))


# Recognised in models -----------------------------------------------------------------------------


def trained(call: Callable[..., Any], model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of all parameters under a fixed loss."""
    model.zero_grad(set_to_none=True)
    output = call(x)
    output = getattr(output, "logits", output)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    (output * weights.to(output)).sum().backward()
    return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(found: list[Tensor], wanted: list[Tensor], allowed: float) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert relative_error(mine, theirs) <= allowed


def test_a_model_with_an_indexer() -> None:
    pytest.importorskip("transformers")
    from tests.passes.test_recognise_selected_models import LAYERS, model, tokens

    kind = "deepseek_v32"
    torch._dynamo.reset()
    network = model(kind, "sdpa").to(DEVICE)
    x = tokens(130).to(DEVICE)
    wanted = trained(network, network, x)
    fast = torch.compile(network, backend=backend)
    assert_same(trained(fast, network, x), wanted, 1e-4)
    assert sparse_compile.explain(network, x).rewritten == LAYERS[kind]


class Moba(nn.Module):
    """Mixture of block attention in plain PyTorch, as its definition reads."""

    def __init__(self, heads: int = 2, dim: int = 64, block: int = 64, kept: int = 3) -> None:
        super().__init__()
        self.heads, self.block, self.kept = heads, block, kept
        self.qkv = nn.Linear(heads * dim, 3 * heads * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        means = k.unflatten(2, (length // self.block, self.block)).mean(3)
        gate = torch.einsum("bhqd,bhnd->bhqn", q, means)
        at = torch.arange(length, device=x.device)
        own, blocks = at[:, None] // self.block, at[: length // self.block]
        gate = gate.masked_fill(blocks > own, -math.inf).masked_fill(blocks == own, math.inf)
        best = gate.topk(self.kept, -1).indices
        mask = torch.zeros_like(gate, dtype=torch.bool).scatter(-1, best, True)
        mask = mask.repeat_interleave(self.block, -1) & (at <= at[:, None])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + out.transpose(1, 2).flatten(2)


def moba(length: int) -> tuple[Moba, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(1, length, 128, generator=torch.Generator().manual_seed(1))
    return Moba().to(DEVICE), x.to(DEVICE)


def peak_bytes(run: Callable[[], Any]) -> int:
    """What a run allocates at most, beyond what was there before."""
    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_moba_is_recognised() -> None:
    torch._dynamo.reset()
    network, x = moba(1024)
    fast = torch.compile(network, backend=backend)
    assert_same(trained(fast, network, x), trained(network, network, x), 1e-4)
    report = sparse_compile.explain(network, x)
    assert [site.executor for site in report.sites] == ["selected"]


def test_moba_takes_no_memory_for_all_pairs() -> None:
    torch._dynamo.reset()
    length = 16384
    network, x = moba(length)
    fast = torch.compile(network, backend=backend)
    # The mask alone would have two heads of a byte for each pair, its bias four bytes for each.
    assert peak_bytes(lambda: trained(fast, network, x)) < 2 * length * length


def test_an_indexer_takes_no_memory_for_all_pairs() -> None:
    length, heads, dim, most = 32768, 4, 32, 64
    q, w = (torch.randn(1, length, heads, *d, device=DEVICE) for d in ((dim,), ()))
    k = torch.randn(1, dim, length, device=DEVICE)
    text = IndexerSpec((), (), True, MaskExpr(KV <= Q), -math.inf, False).text
    run = lambda: INDEXED_TOPK(q, k, w, [], [], most, text)
    assert peak_bytes(run) < 2 * length * length

"""Masks that arrive as dense tensors: in captured graphs, and in sparse_compile.attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_compile
from sparse_compile import explain
from sparse_compile import patterns as P
from sparse_compile.errors import BadPattern, PatternMisuse
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.layout import from_dense
from sparse_compile.layout.from_dense import DenseRead
from sparse_compile.ops import LAYOUT
from sparse_compile.reference import attention as reference
from sparse_compile.spec import AttentionSpec
from tests.tolerance import relative_error

B, H, N, D = 2, 3, 100, 16
SHAPES = [(1, 1, N, N), (B, 1, N, N), (B, H, N, N), (1, H, N, N), (N, N)]
Run = Callable[..., Tensor]
STABLE = {"masks": "stable"}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the masks that were read, one for each pass over a mask."""
    seen: list[tuple[int, ...]] = []
    read = from_dense.read_dense_in_torch

    def spy(mask: Tensor, block_q: int, block_kv: int) -> Any:
        seen.append(tuple(mask.shape))
        return read(mask, block_q, block_kv)

    monkeypatch.setattr(from_dense, "read_dense_in_torch", spy)
    return seen


def blocky(shape: tuple[int, ...] = (1, 1, N, N), empty: int | None = None) -> Tensor:
    """A random mask of rectangles in which every query sees itself, except one."""
    *outer, n_q, n_kv = shape
    coarse = torch.rand(*outer, -(-n_q // 20), -(-n_kv // 20)) < 0.3
    mask = coarse.repeat_interleave(20, -2).repeat_interleave(20, -1)[..., :n_q, :n_kv]
    mask = mask | torch.eye(n_q, n_kv, dtype=torch.bool)
    if empty is not None:
        mask[..., empty, :] = False
    return mask


def operands() -> list[Tensor]:
    return [torch.randn(B, H, N, D, requires_grad=True) for _ in range(3)]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * D**-0.5
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1) @ v


def compiled(run: Run, **options: Any) -> Run:
    return torch.compile(run, backend="sparse_compile", fullgraph=True, **options)


def agrees(run: Run, mask: Tensor, keep: Tensor | None = None, policy: str = "zero") -> None:
    """Result and gradients, against the definition in fp64."""
    given = operands()
    exact = [t.detach().double().requires_grad_() for t in given]
    wanted, _ = reference(*exact, mask if keep is None else keep, None, policy)
    found = run(*given, mask)
    ours = torch.autograd.grad(found.square().sum(), given)
    truth = torch.autograd.grad(wanted.square().sum(), exact)
    for mine, theirs in zip([found, *ours], [wanted, *truth], strict=True):
        # NaN where the program has NaN, and nowhere else.
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert relative_error(mine.nan_to_num(), theirs.nan_to_num()) < 1e-5


def rewritten(run: Run, *args: Any) -> str:
    """The mask in the report of the only attention, which must be rewritten."""
    (site,) = explain(run, *args).sites
    assert site.rewritten, site
    assert site.executor == "cpu"
    assert site.mask is not None
    return site.mask


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("run", [sdpa, eager])
def test_mask_arguments(run: Run, shape: tuple[int, ...]) -> None:
    mask = blocky(shape)
    sizes = ", ".join(map(str, (1,) * (4 - len(shape)) + shape))
    assert rewritten(run, *operands(), mask) == f"tensor [{sizes}]"
    agrees(compiled(run), mask)


@pytest.mark.parametrize("run", [sdpa, eager])
def test_expanded_masks_are_read_once(run: Run, passes: list[tuple[int, ...]]) -> None:
    fast = compiled(run)
    agrees(fast, blocky().expand(B, H, N, N))
    passes.clear()
    agrees(fast, blocky().expand(B, H, N, N))
    assert passes == [(1, 1, N, N)]
    agrees(fast, blocky((B, 1, N, N)).expand(B, H, N, N))


def test_a_stable_mask_is_read_again_only_when_it_changes(passes: list[tuple[int, ...]]) -> None:
    fast, mask = compiled(sdpa, options=STABLE), blocky()
    agrees(fast, mask)
    passes.clear()
    agrees(fast, mask)
    assert passes == []
    mask[..., :40, 60:] = True
    agrees(fast, mask)
    assert len(passes) == 1
    mask &= blocky()
    agrees(fast, mask)
    agrees(fast, mask)
    assert len(passes) == 2
    for _ in range(3):
        agrees(fast, blocky())
    assert len(passes) == 5


def through_data(mask: Tensor, new: Tensor) -> None:
    mask.data.copy_(new)


def through_numpy(mask: Tensor, new: Tensor) -> None:
    mask.numpy()[...] = new.numpy()


def through_the_storage(mask: Tensor, new: Tensor) -> None:
    mask.untyped_storage().copy_(new.untyped_storage())


def by_a_swap(mask: Tensor, new: Tensor) -> None:
    torch.utils.swap_tensors(mask, new)


UNCOUNTED = [through_data, through_numpy, through_the_storage]


@pytest.mark.parametrize("change", [*UNCOUNTED, by_a_swap])
@pytest.mark.parametrize("direct", [False, True], ids=["compiled", "direct"])
def test_a_mask_may_change_in_any_way(
    direct: bool, change: Callable[[Tensor, Tensor], None], passes: list[tuple[int, ...]]
) -> None:
    run, module = sparse_compile.attention if direct else compiled(sdpa), nn.Module()
    module.register_buffer("mask", blocky())
    for number in range(3):
        agrees(run, module.mask)
        assert not number or len(passes) == 1, "read once in each call"
        passes.clear()  # compiling reads it, too
        change(module.mask, blocky())


@pytest.mark.parametrize("options", [{}, {"masks": "stable"}], ids=str)
def test_a_stable_mask_may_be_swapped(options: dict[str, str]) -> None:
    fast, mask = compiled(sdpa, options=options), blocky()
    for _ in range(2):
        agrees(fast, mask)
        by_a_swap(mask, blocky())


def test_layers_share_one_pass(passes: list[tuple[int, ...]]) -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return sdpa(sdpa(q, k, v, mask), k, v, mask)

    fast, mask, given = compiled(layers), blocky(), [t.detach() for t in operands()]
    wanted = layers(*given, mask)
    assert relative_error(fast(*given, mask), wanted.double()) < 1e-5
    passes.clear()
    wanted = layers(*given, mask.logical_or_(blocky()))
    assert relative_error(fast(*given, mask), wanted.double()) < 1e-5
    assert len(passes) == 1


class Buffered(nn.Module):
    """As nanoGPT and GPT-2 keep their masks."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        mask = torch.ones(2 * N, 2 * N).tril().triu(-30).view(1, 1, 2 * N, 2 * N)
        self.register_buffer("keep", mask.to(dtype))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)) * D**-0.5
        n = q.shape[2]
        hidden = self.keep[:, :, :n, :n] == 0
        return torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1) @ v


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_buffers(dtype: torch.dtype, passes: list[tuple[int, ...]]) -> None:
    module = Buffered(dtype)
    fast = compiled(module, options=STABLE)
    for band in (30, 10):
        module.keep.copy_(torch.ones_like(module.keep).tril().triu(-band))
        mask = module.keep[:, :, :N, :N] != 0
        agrees(fast, mask)
        passes.clear()
        agrees(fast, mask)
        # What is computed from a buffer is computed again; a stable bool one is read as it is.
        assert bool(passes) == (dtype != torch.bool)


def test_a_buffer_that_compiled_code_changes() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keep", torch.ones(N, N).tril().triu(-3).bool())

        def forward(self, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
            out = sdpa(q, k, v, self.keep)
            self.keep |= self.keep.roll(7, -1)
            return out

    module = Growing()
    fast = compiled(module)
    for _ in range(4):
        agrees(fast, module.keep.clone())


def test_a_mask_that_is_changed_after_it_was_read() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)) * D**-0.5
        scores = scores.masked_fill(mask, float("-inf"))
        mask.fill_(True)
        return torch.softmax(scores, dim=-1) @ v

    fast = compiled(run)
    for _ in range(2):
        drop = ~blocky()
        agrees(fast, drop, ~drop)
        assert bool(drop.all())


def test_masks_that_the_program_computes(passes: list[tuple[int, ...]]) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, affinity: Tensor) -> Tensor:
        return sdpa(q, k, v, affinity >= affinity.topk(9, -1).values[..., -1:])

    affinity = torch.randn(B, 1, N, N)
    assert rewritten(run, *operands(), affinity) == f"tensor [{B}, 1, {N}, {N}]"
    fast = compiled(run)
    for number in range(3):
        affinity = torch.randn(B, 1, N, N)
        mask = affinity >= affinity.topk(9, -1).values[..., -1:]
        passes.clear()
        agrees(fast, affinity, mask)
        assert len(passes) == 1 or number == 0


@pytest.mark.parametrize(("run", "policy"), [(sdpa, "zero"), (eager, "nan")])
def test_queries_without_a_key(run: Run, policy: str) -> None:
    mask = blocky((B, 1, N, N), empty=37)
    agrees(compiled(run), mask, policy=policy)


def test_added_after_where() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return sdpa(q, k, v, torch.where(mask, 0.0, torch.finfo(q.dtype).min))

    mask = blocky(empty=11)
    assert "tensor" in rewritten(run, *operands(), mask)
    agrees(compiled(run), mask, policy="mean_added")


def test_together_with_other_masks(passes: list[tuple[int, ...]]) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
        causal = torch.ones(N, N, dtype=torch.bool).tril()
        return sdpa(q, k, v, mask & causal & padding[:, None, None])

    padding = torch.ones(B, N, dtype=torch.bool)
    padding[0, 70:] = False
    mask = blocky()
    shown = rewritten(run, *operands(), mask, padding)
    assert "kv <= q" in shown
    assert f"tensor [1, 1, {N}, {N}]" in shown
    fast = compiled(run, options=STABLE)
    keep = mask & torch.ones(N, N).tril().bool() & padding[:, None, None]
    agrees(lambda q, k, v, m: fast(q, k, v, m, padding), mask, keep)
    passes.clear()
    padding[1, :50] = False
    keep = mask & torch.ones(N, N).tril().bool() & padding[:, None, None]
    agrees(lambda q, k, v, m: fast(q, k, v, m, padding), mask, keep)
    assert passes == []


def test_two_mask_tensors() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, other: Tensor) -> Tensor:
        return sdpa(q, k, v, mask | ~other)

    mask, other = blocky(), ~blocky((B, 1, N, N))
    shown = rewritten(run, *operands(), mask, other)
    assert shown.count("tensor") == 2
    fast = compiled(run)
    agrees(lambda q, k, v, m: fast(q, k, v, m, other), mask, mask | ~other)


def test_with_a_restriction() -> None:
    pattern = P.SlidingWindow(12) | P.Strided(16)
    run = sparse_compile.mask(pattern)(lambda q, k, v, mask: sdpa(q, k, v, mask))
    mask = blocky((B, 1, N, N))
    agrees(compiled(run), mask, mask & pattern.dense(N, N))


def test_dynamic_lengths() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("sparse_compile")
    fast = torch.compile(sdpa, backend=counter, fullgraph=True, dynamic=True)
    for n in (40, 56, 72):
        q, k, v = (torch.randn(B, H, n, D) for _ in range(3))
        mask = blocky((1, 1, n, n))
        wanted, _ = reference(q.double(), k.double(), v.double(), mask)
        assert relative_error(fast(q, k, v, mask), wanted) < 1e-5
    assert counter.frame_count == 1


def test_checkpoints() -> None:
    from torch.utils.checkpoint import checkpoint

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return checkpoint(sdpa, q, k, v, mask, use_reentrant=False)

    mask = blocky((B, 1, N, N))
    assert "tensor" in rewritten(run, *operands(), mask)
    agrees(compiled(run), mask)


def test_added_masks_are_left_alone() -> None:
    mask = torch.zeros(N, N).masked_fill(~blocky((N, N)), float("-inf"))
    (site,) = explain(sdpa, *operands(), mask).sites
    assert not site.rewritten
    assert "only known at run time" in site.reason
    assert "pass a bool mask" in site.hint
    assert "promise=True" in site.hint


def test_the_report() -> None:
    mask = torch.zeros(128, 128, dtype=torch.bool)
    mask[:32, :32] = mask[96:, 64:] = True
    q, k, v = (torch.randn(1, 2, 128, D) for _ in range(3))
    (site,) = explain(sdpa, q, k, v, mask).sites
    assert site.reason == ("its blocks are found from the mask tensor in each call")
    assert site.density == pytest.approx(mask.float().mean().item())
    assert site.block_density == pytest.approx(3 / 16)


@pytest.mark.parametrize("remember", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_opcheck(causal: bool, remember: bool) -> None:
    reads = [DenseRead(0, ("", "", "q", "kv"), remember)]
    predicate = sympy.Ne(reads[0].bit, 0) & (KV <= Q if causal else sympy.true)
    spec = AttentionSpec(MaskExpr(predicate, ("int32",)), block_q=32, block_kv=32)
    shape, device = (B, H, N, N, H), torch.device("cpu")
    args = ([blocky()], DenseRead.text(reads), [], *shape, spec.text, device, [])
    torch.library.opcheck(LAYOUT, args)
    layouts = [LAYOUT(*args)[1] for _ in range(2)]
    assert torch.equal(*layouts)
    assert layouts[0].data_ptr() != layouts[1].data_ptr()


# sparse_compile.attention ------------------------------------------------------------------------

DIRECT = [*SHAPES, (H, N, N), (B, 1, 1, N), (1, 1, N, 1)]


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))


@pytest.mark.parametrize("backend", [None, "aot_eager", "sparse_compile"])
@pytest.mark.parametrize("shape", DIRECT, ids=str)
def test_attention(shape: tuple[int, ...], backend: str | None) -> None:
    run: Run = sparse_compile.attention
    if backend:
        run = torch.compile(run, backend=backend, fullgraph=True)
    mask = blocky((*shape[:-2], N, N))[..., : shape[-2], : shape[-1]]
    agrees(run, mask, mask.broadcast_to(B, H, N, N))
    agrees(run, additive(mask), mask.broadcast_to(B, H, N, N))


@pytest.mark.parametrize("kind", [lambda mask: mask, additive], ids=["bool", "additive"])
def test_attention_reads_a_mask_once_in_each_call(
    kind: Callable[[Tensor], Tensor], passes: list[tuple[int, ...]]
) -> None:
    keep = blocky((H, N, N))
    mask = kind(keep)
    for _ in range(2):
        agrees(sparse_compile.attention, mask, keep.broadcast_to(B, H, N, N))
    assert passes == [(1, H, N, N)] * 2
    changed = blocky((H, N, N))
    mask.copy_(kind(changed))
    agrees(sparse_compile.attention, mask, changed.broadcast_to(B, H, N, N))
    assert len(passes) == 3


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("write", [False, True])
def test_compiled_attention_reads_a_given_mask_once(
    write: bool, stable: bool, passes: list[tuple[int, ...]]
) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        q = sparse_compile.attention(q, k, v, mask)
        if write:
            mask |= mask.roll(30, -1)
        return sparse_compile.attention(q, k, v, mask)

    fast, mask = compiled(run, options=STABLE if stable else {}), blocky((N, N))
    given = [t.detach() for t in operands()]
    fast(*given, blocky((N, N)))  # what it takes to compile is not counted
    for number in range(3):
        expected = run(*given, mask.clone())
        passes.clear()
        assert relative_error(fast(*given, mask), expected.double()) < 1e-5
        assert len(passes) == (2 if write else 0 if stable and number else 1)


def test_attention_refuses_a_bias() -> None:
    q, k, v = operands()
    with pytest.raises(BadPattern, match="this attention mask is a bias"):
        sparse_compile.attention(q, k, v, torch.full((N, N), -100.0))
    with pytest.raises(PatternMisuse, match="requires grad"):
        sparse_compile.attention(q, k, v, torch.zeros(N, N, requires_grad=True))
    with pytest.raises(PatternMisuse, match=r"mask of torch\.int64"):
        sparse_compile.attention(q, k, v, torch.ones(N, N, dtype=torch.int64))

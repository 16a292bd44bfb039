"""sparse_compile.flex: what torch's functions of the same names do, forward and backward."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as theirs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_compile
from sparse_compile import flex
from sparse_compile.errors import (
    BadPattern,
    BadShape,
    Inexpressible,
    PatternMisuse,
    UnsupportedDtype,
    WeightsNeeded,
)
from sparse_compile.flex import BlockMask, create_block_mask, flex_attention
from sparse_compile.layout.interop.interchange import from_block_mask
from tests.api.flex_idioms import (
    MASKS,
    SCORES,
    B,
    D,
    Function,
    H,
    Idiom,
    N,
    causal,
    dense,
    documents,
    slopes,
)
from tests.tolerance import assert_close_as_eager, relative_error

IDIOMS = {**MASKS, **SCORES}
TORCH = theirs.flex_attention


def operands(dtype: torch.dtype = torch.float32, n_kv: int = N, kv_heads: int = H) -> Any:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(B, heads, n, D, dtype=dtype)
        for heads, n in ((H, N), (kv_heads, n_kv), (kv_heads, n_kv))
    )
    return q, k, v


def exactly(tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.double() for x in tensors)
    return q, k, v


def learned(idiom: Idiom, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape, dtype=dtype) for shape in idiom.learned]


def blocks(create: Any, mask: Function | None, idiom: Idiom = MASKS["none"], n_kv: int = N) -> Any:
    if mask is None:
        return None
    return create(mask, idiom.batches, idiom.heads, N, n_kv, device="cpu", BLOCK_SIZE=16)


def trained(run: Callable[..., Tensor], tensors: Any) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of all tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = run(*leaves)
    torch.manual_seed(2)
    weights = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return out, list(torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True))


def ours(idiom: Idiom, function: Any = flex_attention) -> Callable[..., Tensor]:
    mask = blocks(create_block_mask, idiom.mask, idiom)

    def run(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        score = idiom.score(*more) if idiom.score else None
        out: Tensor = function(q, k, v, score_mod=score, block_mask=mask)
        return out

    return run


def written_out(idiom: Idiom) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return dense((q, k, v), idiom.mask, idiom.score(*more) if idiom.score else None)[0]

    return run


def compare(idiom: Idiom, run: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> None:
    tensors = [*operands(dtype), *learned(idiom, dtype)]
    out, grads = trained(run, tensors)
    truth, exact = trained(written_out(idiom), [x.double() for x in tensors])
    eager, rough = trained(written_out(idiom), tensors)
    assert_close_as_eager("out", out, eager, truth)
    for name, mine, one, other in zip("qkv", grads, rough, exact, strict=False):
        assert_close_as_eager(f"grad of {name}", mine, one, other)
    for mine, one, other in zip(grads[3:], rough[3:], exact[3:], strict=True):
        # Few sums over all pairs: in half precision chance decides which is closer.
        allowed = 1e-5 if dtype == torch.float32 else 2 * relative_error(one, other)
        assert relative_error(mine, other) <= allowed


# Idioms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IDIOMS)
def test_values_are_those_of_torch(name: str) -> None:
    idiom, (q, k, v) = IDIOMS[name], operands()
    score = idiom.score(*learned(idiom)) if idiom.score else None
    mine, other = (
        blocks(make, idiom.mask, idiom) for make in (create_block_mask, theirs.create_block_mask)
    )
    expected = TORCH(q, k, v, score, other)
    assert relative_error(flex_attention(q, k, v, score, mine), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", IDIOMS)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    compare(IDIOMS[name], ours(IDIOMS[name]), dtype)


@pytest.mark.parametrize("backend", ["sparse_compile", "aot_eager"])
@pytest.mark.parametrize("name", IDIOMS)
def test_compiled_in_one_graph(name: str, backend: str) -> None:
    torch._dynamo.reset()
    function = torch.compile(flex_attention, backend=backend, fullgraph=True)
    compare(IDIOMS[name], ours(IDIOMS[name], function))


def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    function = torch.compile(flex_attention, backend="inductor", fullgraph=True)
    compare(SCORES["relative"], ours(SCORES["relative"], function))


@pytest.mark.parametrize("name", MASKS)
def test_lists_and_pictures_are_those_of_torch(name: str) -> None:
    idiom = MASKS[name]
    if idiom.mask is None:
        return
    mine, other = (
        blocks(make, idiom.mask, idiom) for make in (create_block_mask, theirs.create_block_mask)
    )
    assert (mine.shape, mine.numel(), mine.BLOCK_SIZE) == (other.shape, other.numel(), (16, 16))
    assert mine.sparsity() == other.sparsity()
    assert str(mine) == str(other)
    assert torch.equal(mine.to_dense(), other.to_dense())
    for count, index in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
        ("full_q_num_blocks", "full_q_indices"),
    ):
        counts = getattr(other, count)
        assert torch.equal(getattr(mine, count), counts), count
        listed = torch.arange(getattr(other, index).shape[-1]) < counts[..., None]
        assert torch.equal(getattr(mine, index)[listed], getattr(other, index)[listed]), index
        assert getattr(mine, index).shape == getattr(other, index).shape


def test_full_blocks_are_not_separate_if_so_asked() -> None:
    make = {"device": "cpu", "BLOCK_SIZE": (16, 32), "separate_full_blocks": False}
    mine, other = (m.create_block_mask(causal, None, None, N, N, **make) for m in (flex, theirs))
    assert mine.full_kv_num_blocks is None
    assert torch.equal(mine.kv_num_blocks, other.kv_num_blocks)
    assert torch.equal(mine.to_dense(), other.to_dense())


@pytest.mark.parametrize("compiled", [False, True])
def test_other_lengths_groups_and_scale(compiled: bool) -> None:
    q, k, v = operands(n_kv=40, kv_heads=2)
    function: Any = flex_attention
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(flex_attention, backend="aot_eager", fullgraph=True)

    def late(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return q + 40 - N >= kv

    mask = create_block_mask(late, 1, 1, N, 40, device="cpu")
    out = function(q, k[:1], v[:1], block_mask=mask, scale=0.3, enable_gqa=True)
    k, v = (x[:1].double().expand(B, -1, -1, -1) for x in (k, v))
    assert relative_error(out, dense((q.double(), k, v), late, None, 0.3)[0]) <= 1e-5


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["everything", "causal", "empty rows", "softcap"])
def test_log_sum_exp_with_its_gradient(name: str, compiled: bool) -> None:
    idiom, function = IDIOMS[name], flex_attention
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(flex_attention, backend="sparse_compile", fullgraph=True)
    mask, score = blocks(create_block_mask, idiom.mask), idiom.score() if idiom.score else None
    out, lse = function(*operands(), score, mask, return_lse=True)
    assert lse.dtype == torch.float32
    again, aux = function(*operands(), score, mask, return_aux=flex.AuxRequest(lse=True))
    assert torch.equal(again, out)
    assert torch.equal(aux.lse, lse)
    assert aux.max_scores is None
    other = blocks(theirs.create_block_mask, idiom.mask)
    assert relative_error(lse, TORCH(*operands(), score, other, return_lse=True)[1]) <= 1e-5

    def mine(*x: Tensor) -> Tensor:
        out, lse = function(*x, score, mask, return_lse=True)
        return torch.cat([out, lse.nan_to_num(0, 0, 0)[..., None]], -1)

    def exact(*x: Tensor) -> Tensor:
        out, lse = dense((x[0], x[1], x[2]), idiom.mask, score)
        # Where nothing is attended to the gradient of torch's own is NaN.
        hidden = lse == -torch.inf
        return torch.cat([out, lse.masked_fill(hidden, 0)[..., None]], -1)

    if name != "empty rows":
        _, grads = trained(mine, operands())
        _, truth = trained(exact, [x.double() for x in operands()])
        assert all(relative_error(a, b) <= 1e-5 for a, b in zip(grads, truth, strict=True))


# Functions ---------------------------------------------------------------------------------------


class Biased(nn.Module):
    """As torchtune and others have it: the functions are methods, or made in ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(H, 2 * N - 1))
        self.window = 9

    def score(self, score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return score + self.table[h, q - kv + N - 1]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (ids[b, q] == ids[b, kv]) & (q - kv <= self.window)

        made = create_block_mask(mask, B, None, q.shape[2], k.shape[2], device=q.device)
        out: Tensor = flex_attention(q, k, v, self.score, made)
        return out


@pytest.mark.parametrize("backend", ["sparse_compile", "aot_eager"])
def test_masks_that_are_made_in_compiled_code(backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, ids = Biased(), torch.randint(0, 3, (B, N)).sort().values
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = model(*operands(), ids)
    expected.sum().backward()
    assert model.table.grad is not None
    gradient, model.table.grad = model.table.grad, None
    out = compiled(*operands(), ids)
    out.sum().backward()
    assert relative_error(out, expected) <= 1e-6
    assert relative_error(model.table.grad, gradient) <= 1e-5


def test_other_tensors_compile_nothing() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(flex_attention, backend=counter, fullgraph=True)
    for seed in range(4):
        torch.manual_seed(seed)
        mask = documents(torch.randint(0, 4, (B, N)).sort().values)
        made = create_block_mask(mask, B, None, N, N, device="cpu")
        score = slopes(torch.randn(H))
        out = function(*operands(), score, made)
        assert relative_error(out, dense(exactly(operands()), mask, score)[0]) <= 1e-5
    assert counter.frame_count == 1


def test_sizes_that_change_become_run_time_numbers() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, window: int, cap: float) -> Tensor:
        n = q.shape[2]

        def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (ids[b, q] == ids[b, kv]) & (q - kv < window) & (kv != n - 9) & (kv <= q)

        def score(s: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return torch.tanh(s / cap) * cap + (q - kv) / n

        made = create_block_mask(mask, B, None, n, k.shape[2], device="cpu")
        out: Tensor = flex_attention(q, k, v, score, made)
        return out

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for n, window, cap in ((72, 9, 2.0), (60, 11, 3.0), (48, 13, 4.0), (56, 30, 5.0), (40, 3, 1.0)):
        ids = torch.randint(0, 3, (B, n)).sort().values
        given = [x[:, :, :n] for x in operands()]
        out, expected = compiled(*given, ids, window, cap), step(*given, ids, window, cap)
        assert relative_error(out, expected) <= 1e-6
    assert counter.frame_count <= 2


def test_values_are_read_in_each_call() -> None:
    ids, (q, k, v) = torch.zeros(B, N, dtype=torch.int32), operands()
    mask = create_block_mask(documents(ids), B, None, N, N, device="cpu")
    whole = flex_attention(q, k, v, block_mask=mask)
    assert torch.equal(flex_attention(q, k, v, block_mask=mask), whole)
    ids[:, 30:] = 1
    halves = flex_attention(q, k, v, block_mask=mask)
    truth, _ = dense(exactly((q, k, v)), documents(ids), None)
    assert relative_error(halves, truth) <= 1e-5


def test_blocks_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    from sparse_compile.api import data

    layout = data.ops.LAYOUT
    monkeypatch.setattr(data.ops, "LAYOUT", lambda *args: made.append(args) or layout(*args))
    ids = torch.zeros(B, N, dtype=torch.int64)
    mask = create_block_mask(documents(ids), B, None, N, N, device="cpu")
    for _ in range(3):
        flex_attention(*operands(), block_mask=mask)
    assert len(made) == 1


def test_the_backend_plans_it_and_reports() -> None:
    torch._dynamo.reset()
    mask = blocks(create_block_mask, MASKS["window"].mask)
    score = SCORES["alibi"].score
    assert score is not None
    report = sparse_compile.explain(lambda *x: flex_attention(*x, score(), mask), *operands())
    (site,) = report.sites
    assert site.rewritten
    assert site.mask == "q >= kv and abs(kv - q) <= 9"
    assert "score + 0.25*(kv - q)*exp(" in str(report)


# Masks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_a_part_for_a_token_of_generation(compiled: bool) -> None:
    torch._dynamo.reset()
    q, k, v = operands()
    whole = create_block_mask(causal, None, None, N, N, device="cpu", BLOCK_SIZE=16)
    other = theirs.create_block_mask(causal, None, None, N, N, device="cpu", BLOCK_SIZE=16)

    def step(q: Tensor, position: Tensor) -> Tensor:
        part = whole[:, :, position // 16]
        part.mask_mod = lambda b, h, q, kv: whole.mask_mod(b, h, q + position[0], kv)
        part.seq_lengths = (1, N)
        out: Tensor = flex_attention(q, k, v, block_mask=part)
        return out

    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(step, backend=counter, fullgraph=True) if compiled else step
    exact, _ = dense(exactly((q, k, v)), causal, None)
    for at in (3, 40, N - 1):
        out = function(q[:, :, at : at + 1], torch.tensor([at]))
        assert relative_error(out, exact[:, :, at : at + 1]) <= 1e-5
        part, theirs_part = (m[:, :, torch.tensor([at // 16])] for m in (whole, other))
        assert part.shape == theirs_part.shape
        assert torch.equal(part.to_dense(), theirs_part.to_dense())
    assert counter.frame_count == compiled


def test_parts_by_batch_and_head() -> None:
    idiom = MASKS["documents"]
    mine, other = (blocks(m.create_block_mask, idiom.mask, idiom) for m in (flex, theirs))
    for index in (1, slice(0, 1), (1, 0), (slice(1, 2), slice(0, 1), torch.tensor([2, 0]))):
        part, expected = mine[index], other[index]
        assert part.kv_num_blocks.shape[-3:] == expected.kv_num_blocks.shape[-3:]
        assert torch.equal(part.to_dense(), expected.to_dense())
    assert mine[-1].shape == (1, 1, N, N)
    with pytest.raises(IndexError, match="3 axes"):
        mine[0, 0, 0, 0]
    with pytest.raises(RuntimeError, match=r"part\.mask_mod = "):
        flex_attention(*operands(), block_mask=mine[0])


def test_adjusted_and_moved() -> None:
    mask = blocks(create_block_mask, causal)._adjust(40, 56)
    assert mask.shape == (1, 1, 40, 56)
    q, k, v = operands()
    given = q[:, :, :40], k[:, :, :56], v[:, :, :56]
    exact = create_block_mask(causal, None, None, 40, 56, device="cpu")
    out = flex_attention(*given, block_mask=mask)
    assert torch.equal(out, flex_attention(*given, block_mask=exact))
    assert mask.to("meta").device.type == "meta"
    assert isinstance(mask.to("cpu"), BlockMask)


def listed() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of 4 x 4 blocks: a diagonal that is looked at, and a full column behind it."""
    count = torch.ones(1, 1, 4, dtype=torch.int32)
    index = torch.zeros(1, 1, 4, 4, dtype=torch.int32)
    index[..., 0] = torch.arange(4)
    full = torch.tensor([[[0, 1, 1, 1]]], dtype=torch.int32)
    return count, index, full, torch.zeros(1, 1, 4, 4, dtype=torch.int32)


@pytest.mark.parametrize("compiled", [False, True])
def test_lists_that_say_more_than_the_function(compiled: bool) -> None:
    torch._dynamo.reset()
    function: Any = flex_attention
    if compiled:
        function = torch.compile(flex_attention, backend="sparse_compile", fullgraph=True)
    make = {"BLOCK_SIZE": 18, "mask_mod": causal}
    mask = BlockMask.from_kv_blocks(*listed(), **make)
    assert isinstance(mask, BlockMask)
    assert mask.shape == (1, 1, N, N)

    def allowed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return ((q // 18 == kv // 18) & (q >= kv)) | (kv // 18 == 0) & (q // 18 > 0)

    exact, _ = dense(exactly(operands()), allowed, None)
    assert relative_error(function(*operands(), block_mask=mask), exact) <= 1e-5
    # A mask of torch is taken, too, and means the same.
    other = theirs.BlockMask.from_kv_blocks(*listed(), **make)
    assert relative_error(flex_attention(*operands(), block_mask=other), exact) <= 1e-5
    assert torch.equal(mask.q_num_blocks, other.q_num_blocks)
    assert torch.equal(mask.to_dense(), other.to_dense())
    part = mask._adjust(36, 36)
    assert part.shape == (1, 1, 36, 36)
    assert torch.equal(part.to_dense(), mask.to_dense()[..., :2, :2])


def test_torch_takes_our_masks() -> None:
    mask = blocks(create_block_mask, MASKS["window"].mask)
    assert isinstance(mask, theirs.BlockMask)
    out = TORCH(*operands(), block_mask=mask)
    assert relative_error(flex_attention(*operands(), block_mask=mask), out) <= 1e-5
    assert (
        from_block_mask(mask).kinds().tolist()
        == from_block_mask(blocks(theirs.create_block_mask, MASKS["window"].mask)).kinds().tolist()
    )
    assert len(mask.as_tuple()) == len(blocks(theirs.create_block_mask, causal).as_tuple())


# Memory and signatures ---------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return out


def test_a_million_tokens() -> None:
    n = 1 << 20
    ids = torch.arange(n) // 3000
    began = time.perf_counter()
    with _Largest() as largest:
        mask = create_block_mask(
            lambda b, h, q, kv: (q >= kv) & (q - kv < 1024) & (ids[q] == ids[kv]),
            *(None, None, n, n),
            device="cpu",
        )
        seconds = time.perf_counter() - began
        visited = 100 - mask.sparsity()
    assert seconds < 1
    assert 0.05 < visited < 0.15
    assert largest.bytes < 256 * n  # n * n bits are 512 times as much


def test_attention_makes_nothing_of_all_pairs() -> None:
    n = 4096
    ids = torch.arange(n) // 500
    q = torch.randn(1, 1, n, 8, requires_grad=True)
    with _Largest() as largest:
        mask = create_block_mask(and_window(ids), None, None, n, n, device="cpu")
        flex_attention(q, q, q, lambda s, b, h, i, j: torch.tanh(s), mask).sum().backward()
    assert largest.bytes < n * n / 2


def and_window(ids: Tensor) -> Function:
    return lambda b, h, q, kv: (q >= kv) & (q - kv < 100) & (ids[q] == ids[kv])


@pytest.mark.parametrize(
    "name",
    ["flex_attention", "create_block_mask", "BlockMask", "BlockMask.from_kv_blocks", "create_mask"],
)
def test_parameters_are_those_of_torch(name: str) -> None:
    mine, other = flex, theirs
    for part in name.split("."):
        mine, other = getattr(mine, part), getattr(other, part)
    own = list(inspect.signature(mine).parameters.values())
    for place, parameter in enumerate(inspect.signature(other).parameters.values()):
        assert own[place].name == parameter.name
        assert own[place].kind == parameter.kind
        assert (own[place].default is parameter.empty) <= (parameter.default is parameter.empty)


def test_all_names_of_torch_are_here() -> None:
    assert set(theirs.__all__) <= set(flex.__all__)


# What is refused ---------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {}


def mistake(error: type[Exception], message: str) -> Any:
    def note(call: Callable[[], Any]) -> Callable[[], Any]:
        MISTAKES[call.__name__] = call, error, message
        return call

    return note


def made(mask: Any, *sizes: Any, **more: Any) -> Any:
    return create_block_mask(mask, *(sizes or (None, None, N, N)), **{"device": "cpu", **more})


def scored(score: Any, **more: Any) -> Any:
    return flex_attention(*operands(), score, **more)


@mistake(Inexpressible, "mask_mod returns a whole number, not a bool")
def a_mask_of_numbers() -> Any:
    return made(lambda b, h, q, kv: q - kv)


@mistake(Inexpressible, "returns bool, not a tensor")
def a_mask_of_python() -> Any:
    return made(lambda b, h, q, kv: True)


@mistake(Inexpressible, r"torch.where\(...\) for `if`")
def control_flow() -> Any:
    return scored(lambda s, b, h, q, kv: s if q > kv else s * 2)


@mistake(Inexpressible, r"the value of a number \(item\)")
def a_number_that_is_read() -> Any:
    return made(lambda b, h, q, kv: q > kv.item())


@mistake(Inexpressible, "calls torch's sin. Say it with")
def an_unknown_function() -> Any:
    return scored(lambda s, b, h, q, kv: s + torch.sin(s))


@mistake(Inexpressible, r"changes a tensor in place \(add_\)")
def a_change_in_place() -> Any:
    return scored(lambda s, b, h, q, kv: s.add_(1))


@mistake(Inexpressible, "hides pairs by real numbers")
def a_mask_by_scores() -> Any:
    return scored(lambda s, b, h, q, kv: torch.where(s > 0, s, -float("inf")))


@mistake(Inexpressible, "hides pairs by real numbers")
def a_mask_by_floats() -> Any:
    weights = torch.rand(N)
    return made(lambda b, h, q, kv: weights[kv] > 0.5)


@mistake(Inexpressible, "may be -inf")
def a_hidden_score_that_is_used() -> Any:
    return scored(lambda s, b, h, q, kv: torch.tanh(torch.where(q > kv, s, -float("inf"))))


@mistake(Inexpressible, "makes a whole number of a real one")
def a_score_that_is_rounded() -> Any:
    return scored(lambda s, b, h, q, kv: s + s.to(torch.int64))


@mistake(Inexpressible, r"makes a tensor of \[72\]")
def a_row() -> Any:
    table = torch.randn(N, N)
    return scored(lambda s, b, h, q, kv: s + (table[q] * 2)[kv])


@mistake(Inexpressible, "takes a part of a tensor")
def a_slice() -> Any:
    table = torch.randn(N, N)
    return scored(lambda s, b, h, q, kv: s + table[q, :1])


@mistake(BadPattern, r"shape \[2, 50\] at q, which goes from 0 to 71")
def a_short_table() -> Any:
    return made(documents(torch.zeros(2, 50, dtype=torch.int64)))


@mistake(BadPattern, "BLOCK_SIZE=0. Write how many tokens")
def no_block() -> Any:
    return made(causal, BLOCK_SIZE=0)


@mistake(BadPattern, "H=-1")
def no_heads() -> Any:
    return made(causal, None, -1, N, N)


@mistake(PatternMisuse, "got a score_mod. Pass a function of")
def a_score_as_mask() -> Any:
    return made(SCORES["alibi"].score and SCORES["alibi"].score())


@mistake(PatternMisuse, "a mask_mod of type Tensor")
def a_tensor_as_mask() -> Any:
    return made(torch.ones(N, N))


@mistake(PatternMisuse, "block_mask of type Tensor. Make it with create_block_mask")
def a_tensor_as_block_mask() -> Any:
    return scored(None, block_mask=torch.ones(N, N, dtype=torch.bool))


@mistake(BadPattern, r"made for shape \(1, 1, 72, 80\), but q has 72 tokens and k 72.*_adjust")
def a_longer_mask() -> Any:
    return scored(None, block_mask=made(causal, None, None, N, 80))


@mistake(BadPattern, r"made for shape \(1, 1, 72, 40\).*Make one for these lengths with \w+\.$")
def a_shorter_mask() -> Any:
    return scored(None, block_mask=made(causal, None, None, N, 40))


@mistake(BadPattern, "its heads must be 1 or 4")
def a_mask_for_other_heads() -> Any:
    return scored(None, block_mask=made(causal, None, 3, N, N))


@mistake(BadShape, r"block_mask is on meta, and q on cpu. Write block_mask.to\('cpu'\)")
def a_mask_elsewhere() -> Any:
    return scored(None, block_mask=made(causal, device="meta"))


@mistake(BadShape, "Write enable_gqa=True")
def groups() -> Any:
    return flex_attention(*operands(kv_heads=2))


@mistake(BadShape, "3 key and 3 value heads")
def groups_that_do_not_divide() -> Any:
    return flex_attention(*operands(kv_heads=3), enable_gqa=True)


@mistake(BadShape, r"must be \[B, H, N, D\]")
def three_axes() -> Any:
    return flex_attention(*(x[0] for x in operands()))


@mistake(BadShape, "Move them to one device")
def keys_elsewhere() -> Any:
    q, k, v = operands()
    return flex_attention(q, k.to("meta"), v)


@mistake(UnsupportedDtype, "Cast q, k and v")
def doubles() -> Any:
    return flex_attention(*(x.double() for x in operands()))


@mistake(WeightsNeeded, "Ask for lse=True alone")
def largest_scores() -> Any:
    return scored(None, return_aux=flex.AuxRequest(max_scores=True))


@mistake(PatternMisuse, r"Write return_aux=AuxRequest\(lse=True\) alone")
def both_requests() -> Any:
    return scored(None, return_lse=True, return_aux=flex.AuxRequest(lse=True))


@mistake(BadPattern, "one of the counts and the indices of full blocks")
def half_of_the_lists() -> Any:
    return BlockMask((N, N), *listed()[:3], None, *[None] * 4)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    call, error, message = MISTAKES[name]
    with pytest.raises(error, match=message) as raised:
        call()
    assert str(raised.value).startswith("sparse_compile: ")


def test_mistakes_in_compiled_code_are_told() -> None:
    torch._dynamo.reset()
    function = torch.compile(flex_attention, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"calls torch's sin\. Say it with"):
        function(*operands(), lambda s, b, h, q, kv: s + torch.sin(s))


def test_options_of_kernels_are_noted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_compile.flex import attention

    monkeypatch.setattr(attention, "_NOTED", set())
    with pytest.warns(UserWarning, match=r"kernel_options \['BLOCK_M'\] are for the kernels"):
        flex_attention(*operands(), kernel_options={"BLOCK_M": 64})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flex_attention(*operands(), kernel_options={"BLOCK_M": 64})

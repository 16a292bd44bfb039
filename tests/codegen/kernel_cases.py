"""Attention problems for the Triton kernels, and the check of output and gradients for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import sympy
import torch
from torch import Tensor

from sparse_compile import reference
from sparse_compile.codegen.attend import Executor
from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.triton.blocks import executor as triton_executor
from sparse_compile.expr import (
    KV,
    N_KV,
    N_Q,
    B,
    Dropout,
    FloorDiv,
    FloorMod,
    H,
    MaskExpr,
    Q,
    ScoreData,
    ScoreProgram,
    dense_bit,
    evaluate,
    evaluate_score,
    keeps,
    table,
)
from sparse_compile.expr import size_symbol as size
from sparse_compile.layout import build_views
from sparse_compile.layout.from_dense import dense_layout
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.spec import AttentionSpec, EmptyRows
from sparse_compile.spec.view import Order, View, natural
from tests.tolerance import assert_close_as_eager, relative_error

T0, T1 = table(0), table(1)
S0, S1 = size(0), size(1)


@dataclass(frozen=True)
class Case:
    """One problem. ``tables`` makes the mask's tensors on a device, ``learned`` the score's."""

    name: str
    mask: MaskExpr
    heads: tuple[int, int] = (2, 2)
    n: tuple[int, int] = (150, 150)
    dims: tuple[int, int] = (32, 32)
    dtype: torch.dtype = torch.float32
    batch: int = 1
    block: tuple[int, int] = (64, 64)
    tables: Callable[[Case, torch.device], list[Tensor]] = lambda case, device: []
    sizes: tuple[int, ...] = ()
    scale: float = 0.2
    views: tuple[View, ...] = ()
    score: ScoreProgram | None = None
    learned: Callable[[Case, torch.device], list[Tensor]] = lambda case, device: []
    dropout: float = 0.0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}-b{self.batch}-h{self.heads}-n{self.n}-d{self.dims}-{dtype}"


def documents(case: Case, device: torch.device) -> list[Tensor]:
    """int64 [B, N]: documents of other lengths in each batch entry."""
    position = torch.arange(max(case.n), device=device)
    shift = 17 * torch.arange(case.batch, device=device)[:, None]
    return [(position + shift) // (max(case.n) // 3)]


def windows(case: Case, device: torch.device) -> list[Tensor]:
    """int32 [Hq]: a window per query head."""
    heads = torch.arange(case.heads[0], device=device, dtype=torch.int32)
    return [heads * 25 + 20]


def padding(case: Case, device: torch.device) -> list[Tensor]:
    """bool [B, N]: left padding, and one batch entry that is nothing else."""
    position = torch.arange(max(case.n), device=device)
    start = 40 * torch.arange(case.batch, 0, -1, device=device)[:, None]
    return [position >= start]


def distances(case: Case, device: torch.device) -> list[Tensor]:
    """bool [200] by distance, and a strided int32 table of both coordinates."""
    generator = torch.Generator().manual_seed(5)
    near = torch.rand(200, generator=generator) < 0.6
    both = torch.randint(-3, 4, (case.n[1], 2 * case.n[0]), generator=generator, dtype=torch.int32)
    return [near.to(device), both.to(device).mT[::2]]


def biases(case: Case, device: torch.device) -> list[Tensor]:
    """Tensors that scores read: of distances, of keys, of pairs, and two temperatures."""
    generator = torch.Generator().manual_seed(9)
    heads, (n_q, n_kv) = case.heads[0], case.n
    shapes = (heads, n_q + n_kv - 1), (case.batch, n_kv), (heads, n_q, n_kv), (n_q,), ()
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    made[2] = made[2].mT.contiguous().mT  # keys are not what lies side by side in memory
    return [t.to(device, case.dtype) for t in made]


def bits(case: Case, device: torch.device) -> list[Tensor]:
    """The words of a mask of rectangles, one for each head."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(1, case.heads[0], 20, 20, generator=generator) < 0.4
    mask = coarse.repeat_interleave(20, 2).repeat_interleave(20, 3)
    return [dense_layout(mask[:, :, : case.n[0], : case.n[1]].to(device), 64, 64).table]


CAUSAL = MaskExpr(KV <= Q)
EVERYTHING = MaskExpr(sympy.true)
OFFSET = MaskExpr((KV <= Q + S0) & (KV > Q + S0 - S1), n_sizes=2)

CASES = [
    Case("causal", CAUSAL, heads=(3, 1), dims=(72, 40)),
    Case("everything", EVERYTHING, n=(70, 90), heads=(4, 4)),
    Case("window", MaskExpr((KV <= Q) & (Q - KV < 40)), dtype=torch.bfloat16, dims=(80, 80)),
    Case(
        "documents",
        MaskExpr((KV <= Q) & sympy.Eq(T0(B, Q), T0(B, KV)), ("int64",)),
        batch=2,
        tables=documents,
        dtype=torch.float16,
        block=(32, 64),
    ),
    Case(
        "window per head",
        MaskExpr((KV <= Q) & (Q - KV < T0(H)), ("int32",)),
        heads=(4, 1),
        tables=windows,
        dims=(32, 64),
    ),
    Case(
        "padding",
        MaskExpr(sympy.Ne(T0(B, KV), 0) & (KV <= Q), ("bool",)),
        batch=4,
        heads=(1, 1),
        tables=padding,
        dtype=torch.bfloat16,
    ),
    Case(
        "bits",
        MaskExpr(sympy.Ne(dense_bit(0, ["h", "q", "kv"]), 0) & (KV <= Q + 50), ("int32",)),
        n=(150, 200),
        heads=(4, 2),
        tables=bits,
    ),
    Case("chunks", MaskExpr(sympy.Eq(FloorDiv(Q, 48), FloorDiv(KV, 48))), block=(64, 32)),
    Case(
        "negative division",
        MaskExpr(sympy.Eq(FloorDiv(Q - KV, 32), -1) | sympy.Eq(FloorMod(Q - KV, 7), 3)),
        n=(90, 130),
    ),
    Case(
        "division by a negative size",
        MaskExpr(sympy.Ne(FloorMod(KV - Q, S0), -1) & (FloorDiv(Q - KV, S0) < S1), n_sizes=2),
        n=(100, 70),
        sizes=(-5, 4),
    ),
    Case("offset", OFFSET, n=(37, 190), sizes=(153, 60), dtype=torch.float16, heads=(4, 1)),
    Case("empty rows", OFFSET, n=(150, 60), sizes=(-30, 80), block=(32, 32)),
    Case("huge size", OFFSET, n=(60, 150), sizes=(2**31 - 1, 2**31 + 50)),
    Case("nothing", MaskExpr(sympy.false), n=(40, 50), heads=(1, 1)),
    Case("lengths", MaskExpr(Q * N_KV >= KV * N_Q), n=(60, 190), heads=(6, 2), scale=-0.3),
    Case(
        "tables of differences",
        MaskExpr(sympy.Ne(T0(sympy.Abs(Q - KV)), 0) & (T1(Q, KV) < 2), ("bool", "int32")),
        tables=distances,
        block=(16, 16),
        n=(50, 70),
    ),
    Case(
        "min and max",
        MaskExpr(sympy.Min(Q, 40) >= sympy.Max(KV - 60, 5)),
        n=(80, 130),
        dims=(8, 16),
    ),
    Case(
        "compressed keys",
        MaskExpr(4 * KV + 7 <= Q + S0, n_sizes=1),
        n=(100, 26),
        heads=(4, 2),
        sizes=(11,),
        block=(32, 32),
    ),
    Case("zero scale", CAUSAL, n=(50, 50), scale=0.0, heads=(1, 1)),
]


def residues(s: int, block: int) -> Order:
    """The residue classes modulo ``s``."""
    return Order((block, 1), (s,), (1, 0))


def _views(block: int = 32) -> list[Case]:
    """Masks in views: their orders of queries, of keys and of both differ from the plain one."""
    plain, classes = natural(block), residues(5, block)
    near, strided = CAUSAL.predicate & (Q - KV < 12), sympy.Eq(FloorMod(Q - KV, 5), 0) & (KV <= Q)
    chunk = sympy.Eq(FloorDiv(Q, 40), FloorDiv(KV, 40))
    columns = Order((block // 8, 8), (40,), (0, 1), ((32, 40),))
    summary = FloorMod(KV, 40) >= 32
    row, column = (sympy.Eq(digit(Q, 12), digit(KV, 12)) for digit in (FloorDiv, FloorMod))
    tile = Order((block // 4, 4), (12,), (0, 1))
    square = (sympy.Abs(FloorDiv(Q, 12) - FloorDiv(KV, 12)) <= 1) & (
        sympy.Abs(FloorMod(Q, 12) - FloorMod(KV, 12)) <= 2
    )
    whole = square & sympy.Eq(T0(B, Q), T0(B, KV))
    shared = {"block": (block, block), "n": (150, 150)}
    return [
        Case(
            "strided in two views",
            MaskExpr(near | strided),
            views=(View(near, plain, plain), View(strided & ~near, classes, classes)),
            heads=(4, 2),
            **shared,
        ),
        Case(
            "residues alone",
            MaskExpr(strided),
            views=(View(strided, classes, classes),),
            dtype=torch.bfloat16,
            **shared,
        ),
        Case(
            "columns with the same queries",
            MaskExpr(CAUSAL.predicate & (chunk | summary)),
            views=(
                View(CAUSAL.predicate & chunk, plain, plain),
                View(CAUSAL.predicate & summary & ~chunk, plain, columns),
            ),
            dtype=torch.float16,
            heads=(3, 1),
            **shared,
        ),
        Case(
            "axial",
            MaskExpr(row | column),
            views=(
                View(row, plain, plain),
                View(column & ~row, residues(12, block), residues(12, block)),
            ),
            **shared,
        ),
        Case(
            "tiles of a grid, and documents",
            MaskExpr(whole, ("int64",)),
            views=(View(whole, tile, tile),),
            tables=documents,
            batch=2,
            **shared,
        ),
        Case(
            "rows of a few queries",
            MaskExpr(summary.subs(KV, Q)),
            views=(View(summary.subs(KV, Q), columns, plain),),
            **shared,
        ),
    ]


def _split_in_the_second_section() -> Case:
    """Global tokens in another order than the window: their parts meet what the window found."""
    near, few = sympy.Abs(Q - KV) <= 4, sympy.Eq(FloorMod(Q - KV, 28), 0)
    far = (few | (Q < 3) | (KV < 3)) & ~near
    plain, classes = natural(16), residues(28, 16)
    return Case(
        "global tokens, split, after a window",
        MaskExpr(near | few | (Q < 3) | (KV < 3)),
        n=(420, 420),
        block=(16, 16),
        heads=(2, 1),
        views=(View(near, plain, plain), View(far, classes, classes)),
    )


CASES += [
    *_views(),
    Case("blocks that are no power of two", CAUSAL, n=(400, 400), heads=(2, 1), block=(192, 128)),
    Case(
        "global tokens, split",
        MaskExpr((sympy.Abs(Q - KV) <= 4) | (Q < 3) | (KV < 3)),
        n=(560, 560),
        block=(16, 16),
        heads=(1, 1),
    ),
    _split_in_the_second_section(),
]


def check(case: Case, device: torch.device, executor: Executor = triton_executor) -> None:
    """Output, log-sum-exp and all gradients against fp64, by the rule of tests/tolerance.py."""
    q, k, v, grad_out, grad_lse = _inputs(case, device)
    tables = case.tables(case, device)
    block_q, block_kv = case.block
    learned = case.learned(case, device)
    dropout = Dropout(case.dropout, len(learned)) if case.dropout else None
    spec = AttentionSpec(
        *(case.mask, EmptyRows.ZERO, block_q, block_kv, (), case.views, case.score, dropout)
    )
    layout = build_views(
        spec, ProblemShape(case.batch, case.heads[0], *case.n), tables, case.sizes, device
    )
    mask = dense(case, tables, device)
    seed = torch.tensor([123456789, 987654321], device=device)
    given = tuple(learned) + ((seed,) if dropout else ())
    own = tables, case.sizes, [], case.scale, spec, given, layout
    call = AttentionCall(q, k, v, *own)
    out, lse = executor.forward(call)
    empty = ~mask.any(-1)
    weigh_lse = not bool(empty.any())  # the log-sum-exp of an empty row has no gradient
    wanted = tuple(range(len(learned)))
    result = AttentionResult(out, lse, grad_out, grad_lse if weigh_lse else None, wanted)
    ours = executor.backward(call, result)

    exact = [t.detach().double().requires_grad_() for t in (q, k, v, *learned)]
    score = scoring(case, tables, exact[3:], device)
    dropped = _dropped(case, dropout, seed)
    truth, true_lse = reference.attention(
        *exact[:3], mask, case.scale, score=score, dropped=dropped
    )
    eager_inputs = [t.detach().clone().requires_grad_() for t in (q, k, v, *learned)]
    score = scoring(case, tables, eager_inputs[3:], device)
    eager, eager_lse = _dense_eager(*eager_inputs[:3], mask, case.scale, score, dropped)
    true_grads = _gradients(truth, true_lse, exact, grad_out, grad_lse if weigh_lse else None)
    eager_grads = _gradients(
        eager, eager_lse, eager_inputs, grad_out, grad_lse if weigh_lse else None
    )

    assert torch.equal(lse.isinf(), empty.expand(lse.shape))
    assert not out[empty.expand(lse.shape)].any()
    assert relative_error(lse[~lse.isinf()], true_lse[~lse.isinf()]) <= 1e-5
    assert_close_as_eager("out", out, eager, truth)
    names = ("dq", "dk", "dv", *(f"dw{i}" for i in wanted))
    sources = (q, k, v, *learned)
    for name, value, e, t, source in zip(
        names, ours, eager_grads, true_grads, sources, strict=True
    ):
        assert value.shape == source.shape
        by_token = value.transpose(1, 2) if name in ("dq", "dk", "dv") else value
        assert by_token.is_contiguous()
        assert value.dtype == source.dtype
        assert_close_as_eager(name, value, e, t)


def _inputs(case: Case, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    (q_heads, kv_heads), (n_q, n_kv), (dim, value_dim) = case.heads, case.n, case.dims

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # As models make them: [B, N, H, D] seen as [B, H, N, D]; K and V two halves of one tensor.
    q = normal(case.batch, n_q, q_heads, dim).transpose(1, 2)
    both = normal(case.batch, n_kv, kv_heads, dim + value_dim).transpose(1, 2)
    grad_out = normal(case.batch, q_heads, n_q, value_dim)
    cast = [t.to(device, case.dtype) for t in (q, both, grad_out)]
    grad_lse = normal(case.batch, q_heads, n_q).to(device)
    return [cast[0], cast[1][..., :dim], cast[1][..., dim:], cast[2], grad_lse]


def dense(case: Case, tables: list[Tensor], device: torch.device) -> Tensor:
    """bool [B or 1, Hq or 1, Nq, Nkv]: the mask, by its definition."""
    mask = evaluate(case.mask, _coordinates(case, device), *case.n, tables, case.sizes)
    return mask.broadcast_to(torch.broadcast_shapes(mask.shape, (1, 1, *case.n)))


def _coordinates(case: Case, device: torch.device) -> dict[str, Tensor]:
    shape = (case.batch, case.heads[0], *case.n)
    return {
        name: torch.arange(n, device=device).view([-1 if i == axis else 1 for i in range(4)])
        for axis, (name, n) in enumerate(zip(("b", "h", "q", "kv"), shape, strict=True))
    }


def scoring(
    case: Case, tables: list[Tensor], learned: list[Tensor], device: torch.device
) -> Callable[[Tensor], Tensor] | None:
    """The score program of a case, on scores [B, Hq, Nq, Nkv]."""
    if case.score is None:
        return None
    data = ScoreData(_coordinates(case, device), *case.n, tables, case.sizes, learned)
    absorbed, program = case.score.absorbed, replace(case.score, absorbed=False)

    def moved(scores: Tensor) -> Tensor:
        value = evaluate_score(program, scores, data=data)
        # Of absorbed scores there are gradients alone.
        return value - value.detach() if absorbed else value

    return moved


def _dense_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    score: Callable[[Tensor], Tensor] | None,
    dropped: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What a model would do, in the dtype of its inputs."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    empty = ~mask.any(-1, keepdim=True)
    products = q @ k.mT * scale
    scores = (products if score is None else score(products)).masked_fill(
        ~mask & ~empty, float("-inf")
    )
    weights = scores.softmax(-1) if dropped is None else dropped(scores.softmax(-1))
    return (weights @ v).masked_fill(empty, 0.0), scores.float().logsumexp(-1)


def _dropped(
    case: Case, dropout: Dropout | None, seed: Tensor
) -> Callable[[Tensor], Tensor] | None:
    """What dropout makes of weights [B, Hq, Nq, Nkv]."""
    if dropout is None:
        return None
    kept = keeps(dropout, seed, ScoreData(_coordinates(case, seed.device)))
    assert abs(float(kept.float().mean()) - (1 - case.dropout)) < 0.02
    return lambda weights: weights * kept * dropout.factor


def _gradients(
    out: Tensor, lse: Tensor, inputs: list[Tensor], grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, ...]:
    loss = (out * grad_out).sum()
    if grad_lse is not None:
        loss = loss + (lse * grad_lse).sum()
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The same problem in another precision."""
    return replace(case, dtype=dtype)

"""Calls of every registered operator, and whether their results are stored as the fakes promise."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves, tree_map_only

import sparse_compile.ops.nsa  # noqa: F401  registers its operator
from sparse_compile import passes  # noqa: F401  # registers all operators
from sparse_compile import patterns as P

# These two register all operators.
from sparse_compile.codegen.generators import block_shapes
from sparse_compile.expr import KV, B, FloorDiv, FloorMod, H, MaskExpr, Q, dense_bit, table
from sparse_compile.layout.from_dense import DenseRead
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.layout.views.split_views import choose_views
from sparse_compile.ops.selection import name_selecting

# These two register all operators.
from sparse_compile.passes import pipeline  # noqa: F401
from sparse_compile.selection import canonical
from sparse_compile.sites.annotation import name_mask
from sparse_compile.spec import AttentionSpec, EmptyRows
from sparse_compile.spec.indexer import BlockScoresSpec, IndexerSpec

OPS = torch.ops.sparse_compile
#: How many of their first results operators store by token.
_BY_TOKEN = {"sparse_compile.attention": 1, "sparse_compile.attention_backward": 3}
AXES = ("b", "h", "q", "kv")
NEAR = sympy.Abs(Q - KV) <= 20
_ACROSS, _DOWN = FloorMod(Q, 12) - FloorMod(KV, 12), FloorDiv(Q, 12) - FloorDiv(KV, 12)
PERIODIC = {
    "strided": sympy.Eq(FloorMod(Q - KV, 16), 0),
    "strided and causal": sympy.Eq(FloorMod(Q - KV, 16), 0) & (KV <= Q),
    "dilated": NEAR & sympy.Eq(FloorMod(Q - KV, 4), 0),
    "columns": sympy.Eq(FloorMod(KV, 8), 0),
    "rows": sympy.Eq(FloorMod(Q, 8), 0),
    "checkerboard": sympy.Eq(FloorMod(Q + KV, 2), 0),
    "summaries": (KV <= Q) & ((Q - KV < 16) | sympy.Eq(FloorMod(KV, 16), 15)),
    "dilated on a grid": (sympy.Abs(_ACROSS) <= 4)
    & (sympy.Abs(_DOWN) <= 4)
    & sympy.Eq(FloorMod(_ACROSS, 2), 0)
    & sympy.Eq(FloorMod(_DOWN, 2), 0),
    "columns of a grid": sympy.Eq(_ACROSS, 0),
}
MASKS = {
    **{name: MaskExpr(predicate) for name, predicate in PERIODIC.items()},
    "everything": MaskExpr(sympy.true),
    "nothing": MaskExpr(sympy.false),
    "window": MaskExpr((KV <= Q) & (Q - KV < 20)),
    "by head": MaskExpr((KV <= Q) & (Q - KV < 7 + 9 * H)),
    "by entry": MaskExpr(sympy.Ne(table(0)(B, KV), 0) & NEAR, ("bool",)),
    "random": MaskExpr(sympy.Ne(dense_bit(0, AXES), 0), ("int32",)),
}


@dataclass(frozen=True)
class Problem:
    """Operands and a mask: what calls of all operators are made from."""

    batch: int
    kv_heads: int
    group: int
    n_q: int
    n_kv: int
    dims: tuple[int, int]
    dtype: torch.dtype
    mask: str
    policy: EmptyRows
    strided: bool = True

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch, query heads, n_q and n_kv."""
        return self.batch, self.kv_heads * self.group, self.n_q, self.n_kv

    def operand(self, heads: int, n: int, width: int) -> Tensor:
        """[B, heads, n, width], as models make it, or contiguous."""
        shape = (self.batch, n, heads) if self.strided else (self.batch, heads, n)
        made = torch.randn(*shape, width).to(self.dtype)
        return made.transpose(1, 2) if self.strided else made

    def operands(self) -> list[Tensor]:
        """q, k and v."""
        (_, heads, n_q, n_kv), (dim, value_dim) = self.shape, self.dims
        return [
            self.operand(heads, n_q, dim),
            self.operand(self.kv_heads, n_kv, dim),
            self.operand(self.kv_heads, n_kv, value_dim),
        ]


def problems(longest: int = 200, batch: int = 3) -> st.SearchStrategy[Problem]:
    """Problems of all kinds; lengths of 0 and 1 are not rare."""
    few = st.sampled_from([0, 1, 7])
    dims = [(16, 16), (8, 24), (40, 16)]
    return st.builds(
        Problem,
        batch=st.integers(1, batch),
        kv_heads=st.integers(1, 2),
        group=st.integers(1, 3),
        n_q=few | st.integers(0, longest),
        n_kv=few | st.integers(0, longest),
        dims=st.sampled_from(dims),
        dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        mask=st.sampled_from(list(MASKS)),
        policy=st.sampled_from(EmptyRows),
        strided=st.booleans(),
    )


@functools.lru_cache(maxsize=1024)
def _spec(mask: MaskExpr, policy: EmptyRows) -> AttentionSpec:
    spec, _ = choose_views(mask, ProblemShape(1, 1, 200, 200), (64, 64), block_shapes("cpu"))
    return replace(spec, empty_rows=policy)


Call = tuple[Any, tuple[Any, ...]]
CPU = torch.device("cpu")


def block_calls(problem: Problem) -> Iterator[Call]:
    """Attention to blocks, what it reads, and its backward."""
    batch, heads, n_q, n_kv = problem.shape
    mask, scale = MASKS[problem.mask], 0.2
    spec = _spec(mask, problem.policy)
    tables: list[Tensor] = []
    if problem.mask == "random":
        args: tuple[Any, ...] = (
            [torch.rand(batch, heads, n_q, n_kv) < 0.3],
            DenseRead.text([DenseRead(0, AXES, False)]),
            *([], *problem.shape, problem.kv_heads, spec.text, CPU, []),
        )
        yield OPS.layout, args
        words, *layout = OPS.layout(*args)
        tables = [words]
    else:
        tables = [torch.rand(batch, n_kv) < 0.5] if mask.tables else []
        args = tables, "[]", [], *problem.shape, problem.kv_heads, spec.text, CPU, []
        yield OPS.layout, args
        layout = OPS.layout(*args)
    call = *problem.operands(), [], tables, [], layout, scale, spec.text
    yield OPS.attention, call
    out, lse = OPS.attention(*call)
    for grad_lse in (None, torch.randn(lse.shape)):
        yield OPS.attention_backward, (torch.randn_like(out), grad_lse, out, lse, *call, [])


def selected_calls(problem: Problem) -> Iterator[Call]:
    """Attention to selected keys, alone and merged, and its backward."""
    q, k, v = problem.operands()
    name = problem.mask if not MASKS[problem.mask].tables else "window"
    for unit_q, unit_kv in ((1, 16), (16, 32)):
        rows, units = -(-problem.n_q // unit_q), -(-problem.n_kv // unit_kv)
        given = torch.randint(-1, units + 1, (problem.batch, problem.kv_heads, rows, 3))
        yield OPS.canonical_selection, (given, units)
        index, count = canonical(given, units)
        alone = AttentionSpec.of_units(MASKS[name], unit_q, unit_kv)
        alone = replace(alone, empty_rows=problem.policy)
        beside = MaskExpr(sympy.Not(MASKS[name].predicate) & NEAR)
        both = _spec(beside, problem.policy).with_units(MASKS[name], unit_q, unit_kv)
        for spec in (alone, both):
            shape = *problem.shape, problem.kv_heads
            blocks = OPS.layout([], "[]", [], *shape, both.blocks.text, CPU, [])
            lists = [*(blocks if spec.views else []), index, count]
            call = q, k, v, [], [], [], lists, 0.2, spec.text
            yield OPS.attention, call
            out, lse = OPS.attention(*call)
            args = torch.randn_like(out), torch.randn(lse.shape), out, lse, *call, []
            yield OPS.attention_backward, args


def listing_calls(problem: Problem) -> Iterator[Call]:
    """What selects, by scores, by an index and by a threshold."""
    (batch, heads, n_q, n_kv), mask = problem.shape, MaskExpr(KV <= Q)
    q, k, _ = problem.operands()
    lengths = [heads, n_q, n_kv]
    causal, leaf = mask.text, P.MoBA(block=16, k=2)
    yield OPS.select, (q, k, [], [], [], causal, name_selecting(leaf, problem))
    kept = torch.rand(batch, problem.kv_heads, n_q, n_kv) < 0.3
    for fixed in (False, True):
        yield OPS.kept_selection, (kept, fixed, [], [], lengths, [1, 1], causal)
    scores = BlockScoresSpec(16, (), mask, -math.inf, False, -math.inf)
    keys = k[:, :1].mT
    yield OPS.block_scores, (q, keys, [], [], n_kv // 16 + 1, scores.text)
    indexer = IndexerSpec((("mul", 0.25),), (), True, mask, -math.inf, adds=False).text
    most, weights = min(3, n_kv), torch.randn(batch, n_q, heads).to(problem.dtype)
    for by, at, w in ((q, keys, None), (q.transpose(1, 2), keys[:, 0], weights)):
        yield OPS.indexed_topk, (by, at, w, [], [], most, indexer)
        if most:
            kept_args = by, at, w, [], [], most, indexer, "ge", True, [], [], lengths, causal
            yield OPS.indexed_kept, kept_args
    compressed = problem.operand(problem.kv_heads, max(0, (n_kv - 32) // 16 + 1), problem.dims[0])
    nsa_settings = [16, 64, 4, 32, 16, 1, 2]
    yield OPS.nsa_select, (q, k, compressed, nsa_settings, "upper_left", 0.2)


def pattern_calls(problem: Problem) -> Iterator[Call]:
    """What reads the data of patterns."""
    pattern = P.Padding(tuple([problem.n_kv // 2] * problem.batch))
    bound = pattern.bound()
    key = name_mask(bound, problem)
    dtype = getattr(torch, bound.expr.tables[0])
    yield OPS.pattern_table, (key, 0, 1, dtype, *problem.shape, CPU)
    q, *_ = problem.operands()
    batch, _, n_q, n_kv = problem.shape
    mask = pattern.dense(n_q, n_kv, batch=batch)
    plan = '{"roles":["keep"],"axes":["b","h","q","kv"],"causal":false,"shown":"it"}'
    yield OPS.check_promise, (q, [mask], n_kv, key, plan)


def lookup_calls(problem: Problem) -> Iterator[Call]:
    """A number for each bucket of distances and head."""
    table = torch.randn(5, problem.batch + 1, dtype=problem.dtype)
    indices = [torch.arange(problem.n_q) % 5, torch.arange(problem.batch)[:, None]]
    yield OPS.looked_up, (table, indices)
    grad = torch.randn(problem.batch, problem.n_q, dtype=problem.dtype)
    yield OPS.looked_up_backward, (grad, indices, list(table.shape))


def all_calls(problem: Problem) -> Iterator[Call]:
    """Calls of every operator."""
    for calls in (block_calls, selected_calls, listing_calls, pattern_calls, lookup_calls):
        yield from calls(problem)


def check(call: Call) -> None:
    """Assert that an operator's results are what its fake promises, and alias no argument."""
    operator, args = call
    found, promised = operator(*args), _promised(call)
    results, fakes = tree_leaves(found), tree_leaves(promised)
    assert len(results) == len(fakes)
    memory = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
    for result, fake in zip(results, fakes, strict=True):
        fixed = [isinstance(size, int) for size in fake.shape]
        assert result.dim() == fake.dim(), operator
        kept = [size for size, known in zip(result.shape, fixed, strict=True) if known]
        assert kept == [size for size in fake.shape if isinstance(size, int)], operator
        like = torch.empty(result.shape)
        if any(result is one for one in results[: _BY_TOKEN.get(str(operator), 0)]):
            like = _by_token(result)
        assert result.stride() == like.stride(), (operator, result.shape, result.stride())
        if all(fixed):
            assert result.stride() == fake.stride(), (operator, result.stride(), fake.stride())
        assert (result.dtype, result.device) == (fake.dtype, fake.device), operator
        assert not result.numel() or result.untyped_storage().data_ptr() not in memory, operator


def _by_token(result: Tensor) -> Tensor:
    batch, heads, n, width = result.shape
    return torch.empty(batch, n, heads, width).transpose(1, 2)


def _promised(call: Call) -> Any:
    operator, args = call
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env) as mode, env.ignore_fresh_unbacked_symbols():
        return operator(
            *tree_map_only(Tensor, lambda t: mode.from_tensor(t, static_shapes=True), args)
        )

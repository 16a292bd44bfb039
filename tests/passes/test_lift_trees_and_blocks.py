"""Trees, drafts, packed sequences and block diffusion, written in plain PyTorch: read as symbols.

Each is written as its authors or users do and given to SDPA as a bool tensor. What is read is
compared with what the code itself makes of other inputs, and so is the pattern of the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_compile
from sparse_compile import patterns as P
from sparse_compile.expr import KV, Q
from sparse_compile.sites.site import LiftedMask
from tests.passes.lifting import capture, evaluated, lift, rebound

HEADS = 2
Given = dict[str, Tensor]
Made = Callable[[int], Given]


@dataclass(frozen=True)
class Case:
    """A mask in plain PyTorch.

    Attributes:
        mask: computes it from its arguments, among which q and k are [B, H, N, D].
        given: the arguments at a length of the keys.
        pattern: the same by name.
        pairs: whether it reads a table of pairs, which its tree is.
        most: the share of blocks that are visited, at most.
    """

    mask: Callable[..., Tensor]
    given: Made
    pattern: Callable[[Given], P.Pattern]
    pairs: bool = False
    most: float = 0.8

    @property
    def name(self) -> str:
        return self.mask.__name__


def operands(n_q: int, n_kv: int, batch: int = 2) -> Given:
    generator = torch.Generator().manual_seed(n_kv)
    sizes = {"q": n_q, "k": n_kv}
    return {name: torch.randn(batch, HEADS, n, 8, generator=generator) for name, n in sizes.items()}


def places(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]


def square(n: int) -> Given:
    return operands(n, n)


# Prefix trees --------------------------------------------------------------------------------


def prefix_tree(q: Tensor, k: Tensor, tin: Tensor, tout: Tensor) -> Tensor:
    return (tin[None] <= tin[:, None]) & (tin[:, None] < tout[None])


def prefix_tree_in_order(q: Tensor, k: Tensor, tout: Tensor) -> Tensor:
    row, column = places(q, k)
    return (column <= row) & (row < tout[None])


def prefix_tree_of_each_entry(q: Tensor, k: Tensor, tin: Tensor, tout: Tensor) -> Tensor:
    below = (tin[:, None, :] <= tin[:, :, None]) & (tin[:, :, None] < tout[:, None, :])
    return below[:, None]


def toured(n: int) -> Given:
    """A prompt and two answers, in any order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    tree = P.PrefixTree.of_segments((n // 4, n // 8, n - n // 4 - n // 8), (-1, 0, 0))
    return {**square(n), "tin": order, "tout": torch.tensor(tree.tout)[order]}


def toured_in_order(n: int) -> Given:
    tree = P.PrefixTree.of_segments((n // 4, n // 8, n - n // 4 - n // 8), (-1, 0, 0))
    return {**square(n), "tout": torch.tensor(tree.tout)}


def toured_twice(n: int) -> Given:
    one, other = toured(n), toured_in_order(n)
    tin = torch.stack([one["tin"], torch.arange(n)])
    return {**square(n), "tin": tin, "tout": torch.stack([one["tout"], other["tout"]])}


def tree_of(given: Given) -> P.Pattern:
    return P.PrefixTree(given["tout"], given.get("tin"))


# Drafts --------------------------------------------------------------------------------------


def drafts_behind_ones(q: Tensor, k: Tensor, sees: Tensor) -> Tensor:
    context = torch.ones(q.shape[2], k.shape[2] - q.shape[2], dtype=torch.bool)
    return torch.cat([context, sees], -1)


def drafts_written_to_the_end(q: Tensor, k: Tensor, sees: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    mask[:, k.shape[2] - q.shape[2] :] = sees
    return mask


def drafts_by_place(q: Tensor, k: Tensor, sees: Tensor) -> Tensor:
    row, column = places(q, k)
    draft = column - (k.shape[2] - q.shape[2])
    return (draft < 0) | sees[row, draft.clamp(min=0)]


def drafts_in_a_cache(q: Tensor, k: Tensor, sees: Tensor, context: Tensor) -> Tensor:
    row, column = places(q, k)
    draft = column - context[:, None, None, None]
    inside = (draft >= 0) & (draft < q.shape[2])
    return (draft < 0) | (inside & sees[row, draft.clamp(0, q.shape[2] - 1)])


def drafts(n: int) -> Given:
    sees = P.DraftTree.of_parents(torch.arange(12) // 2 - 1).sees
    return {**operands(12, n), "sees": sees}


def drafts_of_each_entry(n: int) -> Given:
    return {**drafts(n), "context": torch.tensor([n - 20, 3])}


def draft_tree_of(given: Given) -> P.Pattern:
    return P.DraftTree(given["sees"], given.get("context"))


# Packed sequences ----------------------------------------------------------------------------


def packed_by_searching(q: Tensor, k: Tensor, starts: Tensor) -> Tensor:
    row, column = places(q, k)
    sequence = torch.searchsorted(starts[1:], torch.arange(q.shape[2]), right=True)
    return (sequence[:, None] == sequence[None]) & (column <= row)


def packed_with_sinks(q: Tensor, k: Tensor, starts: Tensor) -> Tensor:
    row, column = places(q, k)
    token = torch.arange(q.shape[2])
    sequence = torch.bucketize(token, starts[1:], right=True)
    own = token - starts[sequence]
    near = (row - column < 4) | (own[None] < 2)
    return (sequence[:, None] == sequence[None]) & (column <= row) & near


def packed_in_chunks(q: Tensor, k: Tensor, starts: Tensor) -> Tensor:
    row, column = places(q, k)
    token = torch.arange(q.shape[2])
    sequence = torch.searchsorted(starts[1:], token, right=True)
    chunk = (token - starts[sequence]) // 4
    same = (sequence[:, None] == sequence[None]) & (chunk[:, None] == chunk[None])
    return same & (column <= row)


def packed(n: int) -> Given:
    return {**square(n), "starts": torch.tensor([0, n // 3, n // 3, n // 2, n])}


# Of positions alone --------------------------------------------------------------------------


def block_diffusion(q: Tensor, k: Tensor) -> Tensor:
    """``block_diff_mask`` of https://github.com/kuleshov-group/bd3lms, in its own terms."""
    q_idx, kv_idx = places(q, k)
    n, block_size = q.shape[2] // 2, 4
    x0_flag_q, x0_flag_kv = q_idx >= n, kv_idx >= n
    block_q = torch.where(x0_flag_q == 1, (q_idx - n) // block_size, q_idx // block_size)
    block_kv = torch.where(x0_flag_kv == 1, (kv_idx - n) // block_size, kv_idx // block_size)
    diagonal = (block_q == block_kv) & (x0_flag_q == x0_flag_kv)
    offset_causal = (block_q > block_kv) & (x0_flag_kv == 1) & (x0_flag_q == 0)
    causal = (block_q >= block_kv) & (x0_flag_kv == 1) & (x0_flag_q == 1)
    return diagonal | offset_causal | causal


def streaming(q: Tensor, k: Tensor) -> Tensor:
    row, column = places(q, k)
    return (column <= row) & ((row - column < 6) | (column < 2))


def chunked(q: Tensor, k: Tensor) -> Tensor:
    row, column = places(q, k)
    return (column <= row) & (row // 8 == column // 8)


def block_causal(q: Tensor, k: Tensor) -> Tensor:
    row, column = places(q, k)
    return column // 4 <= row // 4


CASES = [
    Case(prefix_tree, toured, tree_of, most=1),  # tokens in any order are in every block
    Case(prefix_tree_in_order, toured_in_order, tree_of),
    Case(prefix_tree_of_each_entry, toured_twice, tree_of),
    Case(drafts_behind_ones, drafts, draft_tree_of, pairs=True, most=1),
    Case(drafts_written_to_the_end, drafts, draft_tree_of, pairs=True, most=1),
    Case(drafts_by_place, drafts, draft_tree_of, pairs=True, most=1),
    Case(drafts_in_a_cache, drafts_of_each_entry, draft_tree_of, pairs=True),
    Case(packed_by_searching, packed, lambda given: P.Packed(given["starts"], P.Causal())),
    Case(
        packed_with_sinks,
        packed,
        lambda given: P.Packed(given["starts"], P.presets.streaming_llm(4, 2)),
    ),
    Case(
        packed_in_chunks,
        packed,
        lambda given: P.Packed(given["starts"], P.presets.llama4_chunked(4)),
    ),
    Case(block_diffusion, square, lambda given: P.BlockDiffusion(4)),
    Case(streaming, square, lambda given: P.presets.streaming_llm(6, 2)),
    Case(chunked, square, lambda given: P.presets.llama4_chunked(8)),
    Case(block_causal, square, lambda given: P.BlockLocal(4) | P.Causal()),
]
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def attended(case: Case, given: Given) -> Callable[..., Tensor]:
    """Attention with the mask; its arguments have the names of the mask's."""
    names = ", ".join(given)
    scope = {"mask": case.mask, "sdpa": F.scaled_dot_product_attention}
    made: Any = eval(f"lambda {names}: sdpa(q, k, k, attn_mask=mask({names}))", scope)
    return made  # type: ignore[no-any-return]


@EACH
def test_the_pattern_is_what_is_written(case: Case) -> None:
    given = case.given(48)
    shape = (2, HEADS, given["q"].shape[2], 48)
    named = case.pattern(given).dense(shape[2], 48, 2, HEADS)
    assert named.expand(shape).equal(case.mask(**given).expand(shape))


@pytest.mark.parametrize("dynamic", [False, True])
@EACH
def test_it_is_read_as_symbols(case: Case, dynamic: bool) -> None:
    given = case.given(40)
    captured = capture(attended(case, given), *given.values(), dynamic=dynamic)
    found = lift(captured)
    assert isinstance(found, LiftedMask), found
    for lookup in found.mask.lookups:
        of_pairs = lookup.has(Q) and lookup.has(KV)
        assert case.pairs or not of_pairs, found.mask
    for n in (40, *((56, 80) if dynamic else ())):
        other = case.given(n)
        shape = (2, HEADS, other["q"].shape[2], n)
        actual = evaluated(found, rebound(captured, other), shape)
        torch.testing.assert_close(actual, case.mask(**other).expand(shape))


@EACH
def test_only_allowed_blocks_are_computed(case: Case) -> None:
    torch._dynamo.reset()
    given = case.given(256)
    function = attended(case, given)
    options = {"decide": "sparse"}
    compiled = torch.compile(
        function, backend="sparse_compile", fullgraph=True, options=options, dynamic=False
    )
    torch.testing.assert_close(compiled(*given.values()), function(*given.values()))
    torch._dynamo.reset()
    report = sparse_compile.explain_with(options)(function, *given.values())
    (site,) = report.sites
    assert site.rewritten
    assert site.block_density is not None
    assert site.block_density <= case.most, site

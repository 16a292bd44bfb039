"""Packed sequences and halves of block diffusion mean what their definitions say."""

from __future__ import annotations

import pytest
import torch

from sparse_compile import patterns as P
from tests.patterns.brute import Rule, assert_means, spread

#: Of one sequence each: a pattern, and what it means there.
MASKS: list[tuple[P.Pattern, Rule]] = [
    (P.All(), lambda b, h, q, kv: True),
    (P.Causal(), lambda b, h, q, kv: kv <= q),
    (P.SlidingWindow(2, 1), lambda b, h, q, kv: q - 2 <= kv <= q + 1),
    (P.Dilated(2, 2), lambda b, h, q, kv: kv - q in (-4, -2, 0, 2, 4)),
    (P.Strided(2, 1), lambda b, h, q, kv: kv <= q and (q - kv) % 2 == 0),
    (P.Fixed(3, 1), lambda b, h, q, kv: kv <= q and (kv // 3 == q // 3 or kv % 3 == 2)),
    (P.Global(1), lambda b, h, q, kv: 0 in (q, kv)),
    (P.presets.llama4_chunked(2), lambda b, h, q, kv: kv <= q and kv // 2 == q // 2),
    (P.presets.streaming_llm(2, 1), lambda b, h, q, kv: kv <= q and (kv == 0 or q - kv < 2)),
    (P.PrefixLM((3, 1, 2, 0)), lambda b, h, q, kv: kv <= q or kv < (3, 1, 2, 0)[b]),
    (P.heads([P.Causal(), P.All()]), lambda b, h, q, kv: h == 1 or kv <= q),
    (~P.Causal() | P.Global(1), lambda b, h, q, kv: kv > q or 0 in (q, kv)),
    (P.Predicate(lambda b, h, q, kv: (q + kv) % 2 == 0), lambda b, h, q, kv: (q + kv) % 2 == 0),
]
STARTS = (0, 5, 5, 12, 13)


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("mask, rule", MASKS, ids=[str(mask)[:40] for mask, _ in MASKS])
def test_each_sequence_is_as_it_is_alone(mask: P.Pattern, rule: Rule, tensor: bool) -> None:
    starts = torch.tensor(STARTS, dtype=torch.int32) if tensor else STARTS
    sequence = [0] * 5 + [2] * 7 + [3]

    def packed(b: int, h: int, q: int, kv: int) -> bool:
        own = sequence[q]
        return sequence[kv] == own and rule(own, h, q - STARTS[own], kv - STARTS[own])

    assert_means(P.Packed(starts, mask), packed, 13, 13, heads=2)


@pytest.mark.parametrize("tensor", [False, True])
def test_queries_of_other_lengths(tensor: bool) -> None:
    of_queries, of_keys = (0, 2, 3, 3), (0, 4, 9, 11)
    pair = [torch.tensor(t) if tensor else t for t in (of_keys, of_queries)]
    sequence = [0, 0, 1]
    for mask, last in ((P.Causal("lower_right"), True), (P.Causal(), False)):

        def rule(b: int, h: int, q: int, kv: int, last: bool = last) -> bool:
            own = sequence[q]
            start, end = of_keys[own], of_keys[own + 1]
            shift = (end - start) - (of_queries[own + 1] - of_queries[own]) if last else 0
            return start <= kv < end and kv - start <= q - of_queries[own] + shift

        assert_means(P.Packed(pair[0], mask, pair[1]), rule, 3, 11)


def test_a_mask_of_distances_is_that_of_documents() -> None:
    """And costs no more: starts are on both sides of its comparisons."""
    packed = P.Packed(STARTS, P.Causal())
    assert str(packed.bound().expr) == "(kv <= q) & (t0(q) <= kv) & (kv < t1(q))"
    documents = P.Documents(cu_seqlens=STARTS) & P.Causal()
    assert (spread(packed, 13, 13) == spread(documents, 13, 13)).all()


def test_starts_are_read_when_they_are_used() -> None:
    starts = torch.tensor([0, 2, 4])
    pattern = P.Packed(starts, P.All())
    before = pattern.dense(4, 4)[0, 0].int().tolist()
    starts[1] = 3
    assert before == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert pattern.dense(4, 4)[0, 0, 2].tolist() == [True, True, True, False]


def bd3lm(block: int, n: int) -> Rule:
    """The mask of the authors' code: noisy tokens are 0 .. n - 1, clean ones n .. 2 n - 1."""

    def rule(b: int, h: int, q: int, kv: int) -> bool:
        clean_q, clean_kv = q >= n, kv >= n
        block_q, block_kv = (q - n * clean_q) // block, (kv - n * clean_kv) // block
        diagonal = block_q == block_kv and clean_q == clean_kv
        offset_causal = block_q > block_kv and clean_kv and not clean_q
        causal = block_q >= block_kv and clean_kv and clean_q
        return diagonal or offset_causal or causal

    return rule


@pytest.mark.parametrize("block, n", [(1, 4), (2, 6), (4, 8), (3, 7), (5, 5), (9, 4)])
def test_block_diffusion(block: int, n: int) -> None:
    assert_means(P.BlockDiffusion(block), bd3lm(block, n), 2 * n, 2 * n)
    sampling = P.BlockLocal(block) | P.Causal()
    clean = spread(P.BlockDiffusion(block), 2 * n, 2 * n)[..., n:, n:]
    assert (spread(sampling, n, n) == clean).all()

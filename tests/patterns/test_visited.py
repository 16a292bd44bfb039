"""What is visited grows with what is allowed, not with the square of the length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sparse_compile import patterns as P

Made = Callable[[int], tuple[P.Pattern, int, int]]


def rollouts(count: int) -> tuple[P.Pattern, int, int]:
    """A prompt of 256 tokens, and ``count`` answers of 128."""
    lengths, parents = (256, *[128] * count), (-1, *[0] * count)
    n = sum(lengths)
    return P.PrefixTree.of_segments(lengths, parents), n, n


def unordered(count: int) -> tuple[P.Pattern, int, int]:
    """The same, with the tokens of answers in turn: in no order of an Euler tour."""
    n = 256 + 128 * count
    parents = [*range(-1, 255), *([255] * count), *range(256, n - count)]
    return P.PrefixTree.of_parents(torch.tensor(parents)), n, n


def packed(count: int) -> tuple[P.Pattern, int, int]:
    starts = torch.arange(count + 1) * 128
    return P.Packed(starts, P.presets.streaming_llm(64, 4)), 128 * count, 128 * count


def diffusion(count: int) -> tuple[P.Pattern, int, int]:
    return P.BlockDiffusion(32), 256 * count, 256 * count


def chunked(count: int) -> tuple[P.Pattern, int, int]:
    return P.presets.llama4_chunked(128), 128 * count, 128 * count


def streaming(count: int) -> tuple[P.Pattern, int, int]:
    return P.presets.streaming_llm(60, 4), 128 * count, 128 * count


def drafts(count: int) -> tuple[P.Pattern, int, int]:
    """Behind a context of ``count`` times 128 tokens, in a cache with room for 8192."""
    parents = torch.arange(64) // 2 - 1
    return P.DraftTree.of_parents(parents, torch.tensor([128 * count])), 64, 8192


#: What makes it; pairs that are visited beyond those that are allowed, for each query.
LINEAR: list[tuple[Made, int]] = [
    (rollouts, 64),
    (packed, 100),
    (chunked, 64),
    (streaming, 128),
    (drafts, 128),
]


@pytest.mark.parametrize("make, beyond", LINEAR, ids=lambda case: getattr(case, "__name__", ""))
def test_visited_pairs_grow_with_the_length(make: Made, beyond: int) -> None:
    pairs = []
    for count in (4, 8, 16):
        pattern, n_q, n_kv = make(count)
        layout = pattern.layout(n_q, n_kv, block=(64, 64))
        assert layout.allowed_pairs == int(pattern.dense(n_q, n_kv).sum())
        assert layout.visited_pairs <= layout.allowed_pairs + beyond * n_q
        assert layout.visited_pairs < n_q * n_kv // 2
        pairs.append(layout.visited_pairs)
    # From 8 to 16 as much again, twice over, as from 4 to 8.
    assert pairs[2] - pairs[1] <= 2.2 * (pairs[1] - pairs[0])


def test_interleaved_answers_cost_what_is_between_them() -> None:
    """In any order no pair is missed; in depth-first order fewer are visited for nothing."""
    ordered, n, _ = rollouts(4)
    mixed, *_ = unordered(4)
    assert mixed.layout(n, n).allowed_pairs == ordered.layout(n, n).allowed_pairs
    assert mixed.layout(n, n).visited_pairs >= ordered.layout(n, n).visited_pairs


def test_block_diffusion_visits_half_of_half() -> None:
    """Of 2n x 2n pairs, two triangles of n x n, and the diagonal of noisy blocks."""
    for count in (4, 8, 16):
        pattern, n, _ = diffusion(count)
        layout = pattern.layout(n, n, block=(64, 64))
        half = n // 2
        assert layout.allowed_pairs == half * half + 32 * half
        assert layout.visited_pairs <= layout.allowed_pairs + 128 * n

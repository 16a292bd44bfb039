"""Trees of tokens mean what their definition says: who is above whom."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_compile import patterns as P
from tests.patterns.brute import Rule, assert_means

#: A prompt, two rollouts, one of which branches; then another tree.
PARENTS = (-1, 0, 1, 2, 2, 4, 1, 6, -1, 8)


def is_above(parents: tuple[int, ...], upper: int, lower: int) -> bool:
    while lower not in (-1, upper):
        lower = parents[lower]
    return lower == upper


def rule_of(*trees: tuple[int, ...]) -> Rule:
    return lambda b, h, q, kv: is_above(trees[min(b, len(trees) - 1)], kv, q)


@st.composite
def forests(draw: st.DrawFn, most: int = 12) -> tuple[int, ...]:
    """Parents in any order."""
    count = draw(st.integers(1, most))
    parents = [draw(st.integers(-1, node - 1)) for node in range(count)]
    order = draw(st.permutations(range(count)))
    moved = [0] * count
    for node, parent in enumerate(parents):
        moved[order[node]] = -1 if parent < 0 else order[parent]
    return tuple(moved)


@settings(max_examples=40, deadline=None)
@given(forests())
def test_a_token_attends_to_what_is_above(parents: tuple[int, ...]) -> None:
    n, rule = len(parents), rule_of(parents)
    for tree in (P.PrefixTree.of_parents(parents), P.PrefixTree.of_parents(torch.tensor(parents))):
        assert_means(tree, rule, n, n)
    assert_means(P.DraftTree.of_parents(parents), rule, n, n)
    assert_means(P.DraftTree.of_parents(torch.tensor(parents)), rule, n, n)


@settings(max_examples=40, deadline=None)
@given(forests())
def test_a_tour_takes_one_unit_of_time_for_each_token(parents: tuple[int, ...]) -> None:
    tree = P.PrefixTree.of_parents(parents)
    n = len(parents)
    tin = tree.tin or tuple(range(n))
    assert sorted(tin) == list(range(n))
    below = [sum(is_above(parents, node, other) for other in range(n)) for node in range(n)]
    assert tree.tout == tuple(start + count for start, count in zip(tin, below, strict=True))


def test_depth_first_order_needs_one_table() -> None:
    assert P.PrefixTree.of_parents((-1, 0, 1, 0)).tin is None
    assert P.PrefixTree.of_parents((-1, 0, 1, 0)).bound().expr.tables == ("int64",)
    assert P.PrefixTree.of_parents((-1, 0, 0, 1)).tin == (0, 1, 3, 2)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_tree_for_each_batch_entry(tensor: bool) -> None:
    rows = ((-1, 0, 1, 1), (-1, 0, 0, 1))
    tree = P.PrefixTree.of_parents(torch.tensor(rows) if tensor else rows)
    assert_means(tree, rule_of(*rows), 4, 4, batch=2)
    one = P.PrefixTree.of_parents(torch.tensor(rows[1:]) if tensor else rows[1:])
    assert_means(one, rule_of(rows[1]), 4, 4, batch=2)
    drafts = P.DraftTree.of_parents(torch.tensor(rows) if tensor else rows)
    assert_means(drafts, rule_of(*rows), 4, 4, batch=2)


def test_times_may_be_given() -> None:
    tin, tout = torch.tensor([0, 1, 3, 2]), torch.tensor([4, 3, 4, 3])
    assert_means(P.PrefixTree(tout, tin), rule_of((-1, 0, 0, 1)), 4, 4)
    assert_means(P.PrefixTree(tout.int(), tin.int()), rule_of((-1, 0, 0, 1)), 4, 4)


@pytest.mark.parametrize("align", ["upper_left", "lower_right"])
@pytest.mark.parametrize("parents", [PARENTS, (-1, 0, 0, 1, 2, 1, 3, 4, 0, 8)])
def test_fewer_queries_than_keys(parents: tuple[int, ...], align: str) -> None:
    shift = 6 if align == "lower_right" else 0
    rule: Rule = lambda b, h, q, kv: is_above(parents, kv, q + shift)
    assert_means(P.PrefixTree.of_parents(parents, align), rule, 4, 10)


def test_a_path_is_causal_and_single_tokens_see_themselves() -> None:
    path = P.PrefixTree.of_parents(tuple(range(-1, 6)))
    assert path.dense(7, 7).equal(P.Causal().dense(7, 7))
    assert P.PrefixTree.of_parents([-1] * 7).dense(7, 7)[0, 0].equal(torch.eye(7).bool())


def test_segments_continue_each_other() -> None:
    """Each rollout sees what it would see alone."""
    lengths, parents = (3, 2, 4, 1, 2), (-1, 0, 0, 2, -1)
    starts = (0, 3, 5, 9, 10, 12)
    mask = P.PrefixTree.of_segments(lengths, parents).dense(12, 12)[0, 0]
    for last, path in ((1, [0, 1]), (3, [0, 2, 3]), (4, [4])):
        tokens = [t for s in path for t in range(starts[s], starts[s + 1])]
        alone = mask[tokens][:, tokens]
        assert alone.equal(torch.ones_like(alone).tril()), last
        assert int(mask[tokens[-1]].sum()) == len(tokens)


CONTEXTS = [None, 7, 4, (4, 6), torch.tensor([0, 7])]


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_drafts_see_their_context(context: object) -> None:
    parents, n_kv = (-1, -1, 0, 1, 3), 12
    per_entry = {None: (7, 7), 7: (7, 7), 4: (4, 4), (4, 6): (4, 6)}
    lengths = (0, 7) if isinstance(context, torch.Tensor) else per_entry[context]  # type: ignore[index]

    def rule(b: int, h: int, q: int, kv: int) -> bool:
        place = kv - lengths[b]
        return place < 0 or (place < 5 and is_above(parents, place, q))

    for given_parents in (parents, torch.tensor(parents)):
        assert_means(P.DraftTree.of_parents(given_parents, context), rule, 5, n_kv, batch=2)


def test_the_mask_of_a_tree_may_be_given() -> None:
    sees = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1]])
    rule: Rule = lambda b, h, q, kv: kv < 2 or bool(sees[q, kv - 2])
    for given_mask in (sees.bool(), sees, sees.tolist(), sees.bool().tolist()):
        assert_means(P.DraftTree(given_mask), rule, 3, 5)


def test_drafts_are_read_when_they_are_used() -> None:
    sees, context = torch.eye(2).bool(), torch.tensor([1])
    tree = P.DraftTree(sees, context)
    before = tree.dense(2, 4)[0, 0].int().tolist()
    sees[1, 0], context[0] = True, 2
    assert before == [[1, 1, 0, 0], [1, 0, 1, 0]]
    assert tree.dense(2, 4)[0, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]

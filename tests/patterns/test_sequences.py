"""Patterns of a sequence mean what their definitions say, entry by entry."""

from __future__ import annotations

import pytest

from sparse_compile import patterns as P
from tests.patterns.brute import Rule, assert_means, brute, spread

SIZES = [(7, 7), (5, 9), (9, 5), (1, 12), (13, 13)]
ALIGNMENTS = ["upper_left", "lower_right"]


def distance_rule(rule: Rule, n_q: int, n_kv: int, align: str) -> Rule:
    """``rule`` for queries that stand where ``align`` puts them."""
    shift = n_kv - n_q if align == "lower_right" else 0
    return lambda b, h, q, kv: rule(b, h, q + shift, kv)


RELATIVE = [
    (lambda a: P.Causal(a), lambda b, h, q, kv: kv <= q),
    (lambda a: P.SlidingWindow(2, align=a), lambda b, h, q, kv: kv in range(q - 2, q + 3)),
    (lambda a: P.SlidingWindow(3, 0, a), lambda b, h, q, kv: kv in range(q - 3, q + 1)),
    (lambda a: P.SlidingWindow(0, 2, a), lambda b, h, q, kv: kv in range(q, q + 3)),
    (
        lambda a: P.Dilated(2, 3, align=a),
        lambda b, h, q, kv: kv in {q + 3 * j for j in range(-2, 3)},
    ),
    (lambda a: P.Dilated(2, 1, True, a), lambda b, h, q, kv: kv in {q - j for j in range(3)}),
    (lambda a: P.Dilated(2, 2, True, a), lambda b, h, q, kv: kv in {q - 2 * j for j in range(3)}),
    (
        lambda a: P.Strided(3, align=a),
        lambda b, h, q, kv: kv in range(q - 2, q + 1) or kv in range(q, -1, -3),
    ),
    (
        lambda a: P.Strided(4, 2, align=a),
        lambda b, h, q, kv: kv in {q - 1, q} or kv in range(q, -1, -4),
    ),
    (lambda a: P.Strided(2, 1, align=a), lambda b, h, q, kv: kv in range(q, -1, -2)),
    (
        lambda a: P.Strided(4, 2, False, a),
        lambda b, h, q, kv: kv in {q - 1, q, q + 1} or abs(q - kv) in range(0, 99, 4),
    ),
    (
        lambda a: P.Fixed(4, 1, align=a),
        lambda b, h, q, kv: kv <= q and (kv // 4 == q // 4 or kv in {3, 7, 11}),
    ),
    (
        lambda a: P.Fixed(5, 2, False, a),
        lambda b, h, q, kv: kv // 5 == q // 5 or kv in {3, 4, 8, 9},
    ),
    (lambda a: P.BlockLocal(3, align=a), lambda b, h, q, kv: kv // 3 == q // 3),
    (lambda a: P.Global(2, align=a), lambda b, h, q, kv: q in {0, 1} or kv in {0, 1}),
    (lambda a: P.Global(1, align=a), lambda b, h, q, kv: 0 in {q, kv}),
    (lambda a: P.Global((4, 0, 1), align=a), lambda b, h, q, kv: {q, kv} & {0, 1, 4}),
    (lambda a: P.Global((3,), rows=False, align=a), lambda b, h, q, kv: kv == 3),
    (
        lambda a: P.Longformer(4, align=a),
        lambda b, h, q, kv: kv in range(q - 2, q + 3) or 0 in {q, kv},
    ),
    (
        lambda a: P.Longformer(3, (1, 4), a),
        lambda b, h, q, kv: abs(q - kv) <= 1 or {q, kv} & {1, 4},
    ),
    (lambda a: P.PrefixLM(3, a), lambda b, h, q, kv: kv < 3 or kv <= q),
]


@pytest.mark.parametrize("n_q, n_kv", SIZES)
@pytest.mark.parametrize("align", ALIGNMENTS)
@pytest.mark.parametrize("make, rule", RELATIVE, ids=lambda case: "")
def test_relative_patterns(make, rule: Rule, align: str, n_q: int, n_kv: int) -> None:
    assert_means(make(align), distance_rule(rule, n_q, n_kv, align), n_q, n_kv)


def test_all() -> None:
    assert_means(P.All(), lambda *at: True, 3, 5)
    assert not (~P.All()).dense(3, 5).any()
    assert P.All().dense(3, 5, batch=2, heads=4).shape == (1, 1, 3, 5)


def test_dense_has_batch_and_heads_where_the_pattern_does() -> None:
    padding, per_head = P.Padding((1, 2)), P.heads([P.All(), P.Causal(), P.All()])
    assert padding.dense(2, 2, 2, 3).shape == (2, 1, 2, 2)
    assert per_head.dense(2, 2, 2, 3).shape == (1, 3, 2, 2)
    assert (padding & per_head).dense(2, 2, 2, 3).shape == (2, 3, 2, 2)
    assert P.All().dense(2, 2).is_contiguous()


def test_many_global_tokens_are_looked_up() -> None:
    tokens = tuple(range(0, 20, 2))
    few, many = P.Global(tokens[:8]), P.Global(tokens)
    assert not few.bound().expr.uses_table
    assert many.bound().expr.tables == ("bool",)
    assert_means(many, lambda b, h, q, kv: {q, kv} & {*tokens}, 23, 21)
    late = P.Global(tokens, align="lower_right")
    rule = lambda b, h, q, kv: {q - 4, kv} & {*tokens}
    assert_means(late, rule, 25, 21)


@pytest.mark.parametrize("n_q, n_kv", [(12, 12), (7, 14), (13, 10)])
@pytest.mark.parametrize("per_head", [False, True])
def test_random(n_q: int, n_kv: int, per_head: bool) -> None:
    mask = spread(P.Random(3, 2, 5, per_head), n_q, n_kv, heads=4)
    rows, columns = -(-n_q // 3), -(-n_kv // 3)
    for head in range(4):
        for row in range(rows):
            queries = mask[0, head, 3 * row : 3 * row + 3]
            seen = {kv // 3 for kv in range(n_kv) if queries[0, kv]}
            assert len(seen) == 2
            assert seen <= set(range(columns))
            assert (queries == [[kv // 3 in seen for kv in range(n_kv)]]).all()
    assert (mask[0, 0] == mask[0, 1]).all() != per_head


def test_random_depends_on_its_seed_only() -> None:
    assert P.Random(2, 2, 1).dense(40, 40).equal(P.Random(2, 2, 1).dense(40, 40))
    assert not P.Random(2, 2, 1).dense(40, 40).equal(P.Random(2, 2, 2).dense(40, 40))


@pytest.mark.parametrize("n_q, n_kv", [(40, 40), (38, 38), (20, 40), (41, 29)])
@pytest.mark.parametrize(
    "random, global_, window", [(2, 1, 3), (0, 2, 1), (1, 0, 5), (3, 2, 3), (0, 0, 3)]
)
def test_bigbird(n_q: int, n_kv: int, random: int, global_: int, window: int) -> None:
    pattern = P.BigBird(4, random, global_, window, seed=3)
    mask, half = spread(pattern, n_q, n_kv)[0, 0], window // 2
    columns = -(-n_kv // 4)
    for q in range(n_q):
        row = q // 4
        seen = {kv // 4 for kv in range(n_kv) if mask[q, kv]}
        assert (mask[q] == [kv // 4 in seen for kv in range(n_kv)]).all()
        if row < global_:
            assert seen == set(range(columns))
            continue
        near = {j for j in range(columns) if abs(row - j) <= half}
        assert near | set(range(global_)) <= seen
        assert len(seen - near - set(range(global_))) == random
        assert (mask[q] == mask[4 * row]).all()


def test_block_permutations() -> None:
    pattern = P.BlockLocal(4, (2, 0, 1))
    rule = lambda b, h, q, kv: kv // 4 == {0: 2, 1: 0, 2: 1}[q // 4]
    assert_means(pattern, rule, 12, 12)
    assert_means(pattern, rule, 10, 9)


def test_presets() -> None:
    sizes = {
        "longformer_base_4096": (4096, 512 + 1 + 1),
        "bigbird_base_4096": (4096, 64 * (3 + 3 + 2)),
        "sparse_transformer_strided": (3072, 128 + (2000 // 128)),
        "sparse_transformer_fixed": (3072, 2000 % 128 + 1 + 8 * (2000 // 128)),
        "axial_transformer_64": (4096, 64 + 63),
    }
    for name, (length, seen) in sizes.items():
        pattern = getattr(P.presets, name)()
        pattern.check(length, length, 1, 12)
        bound = pattern.bound()
        row = RowOf(pattern, 2000).dense(1, length)
        assert int(row.sum()) == seen, (name, bound)


class RowOf(P.Pattern):
    """One row of a large mask."""

    def __init__(self, pattern: P.Pattern, row: int) -> None:
        self.pattern, self.row = pattern, row

    def bound(self) -> P.BoundMask:
        from sparse_compile.expr import MaskExpr, Q

        bound = self.pattern.bound()
        expr = MaskExpr(bound.expr.predicate.subs(Q, self.row), bound.expr.tables)
        makers = [lambda d, n_q, *size, make=make: make(d, size[0], *size) for make in bound.makers]
        return P.BoundMask(expr, tuple(makers))


@pytest.mark.parametrize("count, split", [(2, [10, 2]), (3, [8, 2, 2])])
def test_blockbert(count: int, split: list[int]) -> None:
    pattern = P.presets.blockbert(length=6 * count, blocks=count)
    shifts = [shift for shift, heads in enumerate(split) for _ in range(heads)]
    rule = lambda b, h, q, kv: kv // 6 == (q // 6 + shifts[h]) % count
    assert (
        spread(pattern, 6 * count, 6 * count, heads=12)
        == brute(rule, 6 * count, 6 * count, heads=12)
    ).all()

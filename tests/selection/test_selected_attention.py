"""Attention over selected keys on the CPU: the dense definition, forward and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparse_compile
from sparse_compile import patterns as P
from sparse_compile.errors import BadPattern, BadShape
from sparse_compile.layout.listed import places
from sparse_compile.ops import ATTENTION
from sparse_compile.selection import canonical, check_lists, checked_select
from tests.selection.cases import CASES, Case


def run(case: Case, operands: list[Tensor]) -> list[Tensor]:
    *inputs, grad = operands
    q, k, v = (t.detach().requires_grad_() for t in inputs)
    chosen = case.selection()
    scale = case.factor
    lists = [chosen.index, chosen.count]
    out, lse = ATTENTION(q, k, v, [], [], [], lists, scale, case.spec.text)
    return [out, lse, *torch.autograd.grad(out, (q, k, v), grad)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_dense_definition(case: Case) -> None:
    for found, wanted in zip(run(case, case.operands()), case.expected(), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_operator_fits_torch() -> None:
    case = CASES[0]
    q, k, v = (t.requires_grad_() for t in case.operands()[:3])
    chosen = case.selection()
    torch.library.opcheck(
        ATTENTION,
        (q, k, v, [], [], [], [chosen.index, chosen.count], 0.25, case.spec.text),
    )


def test_lists_are_made_canonical() -> None:
    index = torch.tensor([[[[5, 2, -1, 2, 9], [0, 0, 0, 0, 0], [-3, -1, 7, 8, 9]]]])
    found, count = canonical(index, 6)
    assert count.tolist() == [[[2, 1, 0]]]
    assert found[0, 0, 0, :2].tolist() == [2, 5]
    assert found[0, 0, 1, :1].tolist() == [0]


def test_entries_by_unit_of_keys_name_each_pair_once() -> None:
    case = CASES[0]
    chosen = case.selection()
    units = -(-case.n_kv // case.unit_kv)
    start, order = places(chosen.index, chosen.count, units)
    rows = order // case.most
    dense = torch.zeros(case.batch, case.lists, case.n_q, units, dtype=torch.bool)
    for b in range(case.batch):
        for s in range(case.lists):
            for j in range(units):
                own = rows[b, s, start[b, s, j] : start[b, s, j + 1]].long()
                assert (own.diff() > 0).all()
                dense[b, s, own, j] = True
    by_token = dense.repeat_interleave(case.unit_kv, 3)[..., : case.n_kv]
    assert torch.equal(by_token, chosen.dense(case.n_q, case.n_kv))


def test_a_selection_that_does_not_fit() -> None:
    case = CASES[0]
    q, k, v, _ = case.operands()
    chosen = case.selection()
    lists = [chosen.index[:, :, 1:], chosen.count]
    with pytest.raises(BadShape, match=r"ceil\(Nq / unit_q\)"):
        ATTENTION(q, k, v, [], [], [], lists, 1.0, case.spec.text)
    lists = [chosen.index.long(), chosen.count]
    with pytest.raises(BadShape, match="int32"):
        ATTENTION(q, k, v, [], [], [], lists, 1.0, case.spec.text)


@pytest.mark.parametrize(
    ("entries", "count", "message"),
    [
        ([0, -1, 3], 2, r"lists unit -1 at \[1, 0, 5, 1\], but there are 7"),
        ([0, 7, 3], 2, r"lists unit 7 at \[1, 0, 5, 1\], but there are 7"),
        ([3, 1, 5], 2, r"lists unit 1 at \[1, 0, 5, 1\], after unit 3"),
        ([3, 3, 5], 2, r"after unit 3\. Pass what selection.canonical\(index, units\)"),
        ([0, 1, 3], 4, r"counts 4 of 3 units at \[1, 0, 5\]"),
        ([0, 1, 3], -1, r"counts -1 of 3 units"),
        ([0, 1, -1], 2, None),
        ([9, 8, 7], 0, None),
    ],
)
def test_lists_that_are_not_canonical(entries: list[int], count: int, message: str | None) -> None:
    case = CASES[0]
    q, k, v, _ = case.operands()
    chosen = case.selection()
    chosen.index[1, 0, 5], chosen.count[1, 0, 5] = torch.tensor(entries), count
    lists = chosen.index, chosen.count
    if message is None:
        ATTENTION(q, k, v, [], [], [], lists, 1.0, case.spec.text)
        return
    with pytest.raises(BadPattern, match=message):
        ATTENTION(q, k, v, [], [], [], lists, 1.0, case.spec.text)
    for called in (check_lists, lambda *_: checked_select(chosen.pattern, q, k)):
        with pytest.raises(BadPattern, match=message):
            called(*lists, 7)
    with pytest.raises(BadPattern, match=message):
        sparse_compile.attention(q, k, v, chosen.pattern | P.SlidingWindow(3))


def test_stretches_hold_the_same_entries_one_after_another() -> None:
    case, stretch = CASES[0], 16
    chosen = case.selection()
    units = -(-case.n_kv // case.unit_kv)
    start, order = places(chosen.index, chosen.count, units, stretch)
    _, plain = places(chosen.index, chosen.count, units)
    assert start.shape[-1] == -(-case.n_q // stretch) * units + 1
    for b in range(case.batch):
        for h in range(case.lists):
            used = int(start[b, h, -1])
            assert used == chosen.count[b, h].sum()
            rows = order[b, h, :used] // case.most
            assert ((rows // stretch).diff() >= 0).all()
            mine, its = (t[b, h, :used].sort().values for t in (order, plain))
            assert torch.equal(mine, its)

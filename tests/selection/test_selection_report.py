"""How much a selection selects, counted in its dense mask; and what explain says of it."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor, nn

import sparse_compile
from sparse_compile import Selection
from sparse_compile import patterns as P
from sparse_compile.inspect.report import Report
from sparse_compile.selection import canonical
from tests.selection.cases import CASES, Case
from tests.selection.test_composition import N, operands


@pytest.mark.parametrize("case", [case for case in CASES if case.n_q > 1], ids=str)
def test_numbers_are_those_of_the_dense_mask(case: Case) -> None:
    chosen = case.selection()
    found = chosen.report(case.n_q, case.n_kv)
    counts = sorted(chosen.count.flatten().tolist())
    assert found.lists == len(counts)
    assert (found.least, found.most) == (counts[0], counts[-1])
    assert found.median == statistics.median(counts)
    assert found.mean == pytest.approx(statistics.fmean(counts))
    assert sum(count <= found.p95 for count in counts) >= 0.95 * len(counts)
    assert sum(count < found.p95 for count in counts) < 0.95 * len(counts)
    dense = chosen.dense(case.n_q, case.n_kv)
    assert found.density == pytest.approx(float(dense.float().mean()))
    assert found.room_for_all == (case.most >= -(-case.n_kv // case.unit_kv))


def test_as_a_sentence() -> None:
    index = torch.tensor([[[[0, 3, 1], [1, 1, 1], [2, 2, 0], [-1, -1, -1]]]])
    chosen = Selection(*canonical(index, 4), 16, 1)
    assert str(chosen.report(64, 4)) == (
        "0 to 3 of 4 units of 1 key for each 16 queries (median 1.5, mean 1.5, 95 % have at most "
        "3), 38 % of the pairs"
    )
    q, k, _ = operands(4, 2, N, N, torch.float32)
    everything = sparse_compile.select(P.TopK(99, unit_kv=16), q, k)
    assert str(everything.report(N, N)) == (
        "5 of 5 units of 16 keys for each query, 100 % of the pairs; there is room for all: a "
        "top-k keeps all"
    )


@pytest.mark.parametrize("lengths", [(0, 10), (10, 0)], ids=str)
def test_of_nothing(lengths: tuple[int, int]) -> None:
    q, k, _ = operands(4, 2, *lengths, torch.float32)
    found = sparse_compile.select(P.TopK(2, unit_kv=16), q, k).report(*lengths)
    assert (found.most, found.density) == (0, 0.0)


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize(
    "mask",
    [P.TopK(2, unit_kv=16), P.TopK(2, unit_kv=16) | P.SlidingWindow(3)],
    ids=["selected alone", "with a static part"],
)
def test_explain_counts_what_this_call_selects(mask: P.Pattern) -> None:
    model = sparse_compile.mask(Attend(), mask)
    q, k, v = operands(4, 2, N, N, torch.float32)
    report = sparse_compile.explain(model, q, k, v)
    (site,) = report.sites
    assert site.lists == sparse_compile.select(P.Causal() & mask, q, k).report(N, N)
    assert f"selected    {site.lists}"[:60] in str(report)
    assert Report.from_json(report.to_json()) == report


def test_explain_counts_what_an_index_of_the_code_names() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        named = torch.zeros(2, 1, N, N, dtype=torch.bool).scatter(-1, index, True)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=named)

    q, k, v = operands(2, 2, N, N, torch.float32)
    index = torch.arange(N)[:, None].expand(2, 1, N, 3).remainder(torch.tensor([5, 7, 11]))
    (site,) = sparse_compile.explain(model, q, k, v, index).sites
    assert site.lists == Selection(*canonical(index, N), 1, 1).report(N, N)

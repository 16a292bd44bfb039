"""What patterns select on a CUDA device: as on the CPU, without waiting, in CUDA graphs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_compile import patterns as P
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.selection import Selection
from sparse_compile.selection.builders import BUILDERS
from sparse_compile.selection.masses import windows_of
from sparse_compile.selection.select import scoring
from sparse_compile.selection.select import select as select_by
from tests.gpu.waiting import no_waiting
from tests.handed_in import serve_nothing
from tests.selection.interpreted_windows import task_of
from tests.selection.test_scored import MASKS, SCORERS, assert_canonical, indexer, operands

DEVICE = torch.device("cuda")
RULES = [
    P.TopK(3, unit_kv=16),
    P.TopK((1, 3), unit_kv=16),
    P.TopK(3, unit_kv=16, sink=1, local=2),
    P.TopK(2, unit_kv=16, block=32, diagonal=True),
    P.TopRatio(0.4, unit_kv=16),
    P.TopRatio((0.2, 0.9), unit_kv=16, diagonal=True),
    P.TopP(0.7, unit_kv=16),
    P.TopP((0.3, 1.0), unit_kv=16, sink=1),
    P.TopP(0.9, unit_kv=16, most=2),
    P.Threshold(0.1, unit_kv=16),
    P.Threshold((-0.2, 0.3), unit_kv=16, local=1),
    P.Threshold(0.2, unit_kv=16, of="softmax"),
]
#: Of scores without equal ones near a limit, and of integers, where nearly all have equals.
KINDS = ["floats", "integers"]


def moved(pattern: Any, device: torch.device) -> Any:
    """The pattern, with what its scorer holds on a device."""
    if not isinstance(pattern.scorer, P.Indexer):
        return pattern
    held = pattern.scorer
    scorer = P.Indexer(*(t.to(device) for t in (held.q_index, held.k_index, held.weights)))
    fields = {name: getattr(pattern, name) for name in ("unit_kv", "unit_q", "sink", "local")}
    return type(pattern)(pattern.k, scorer=scorer, **fields)


def select(pattern: Any, q: Tensor, k: Tensor, mask: P.Pattern | None) -> Selection:
    """On the device of q."""
    pattern = moved(pattern, q.device)
    if mask is None:
        return select_by(pattern, q, k)
    bound = mask.bound()
    lengths = q.shape[2], k.shape[2], q.shape[0], q.shape[1]
    return select_by(pattern, q, k, bound.expr, bound.tables(str(q.device), *lengths))


def inputs(kind: str, heads: tuple[int, int] = (4, 2), n_q: int = 100, n_kv: int = 100) -> Any:
    """q and k; of integers, means and products are exact, as is the factor 1 / sqrt(16)."""
    q, k = operands(heads, n_q, n_kv, 16)
    return (q, k) if kind == "floats" else ((2 * q).round(), (2 * k).round())


def assert_same_as_on_the_cpu(pattern: Any, q: Tensor, k: Tensor, mask: P.Pattern | None) -> None:
    found = select(pattern, q.to(DEVICE), k.to(DEVICE), mask)
    wanted = select(pattern, q, k, mask)
    found = Selection(found.index.cpu(), found.count.cpu(), found.unit_q, found.unit_kv)
    assert_canonical(found, k.shape[2])
    assert torch.equal(found.count, wanted.count)
    used = torch.arange(found.index.shape[-1]) < found.count[..., None]
    assert torch.equal(found.index.masked_fill(~used, -1), wanted.index.masked_fill(~used, -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", RULES, ids=repr)
def test_rules(pattern: Any, kind: str) -> None:
    for mask in (None, P.Causal()):
        assert_same_as_on_the_cpu(pattern, *inputs(kind), mask)


@pytest.mark.parametrize("pattern", SCORERS, ids=repr)
@pytest.mark.parametrize("mask", MASKS, ids=range(len(MASKS)))
def test_scorers(pattern: Any, mask: P.Pattern | None) -> None:
    assert_same_as_on_the_cpu(pattern, *inputs("floats"), mask)


@pytest.mark.parametrize("units", [(1, 1), (16, 1), (1, 16), (16, 32)], ids=str)
def test_indexer(units: tuple[int, int]) -> None:
    pattern = P.TopK(5, unit_q=units[0], unit_kv=units[1], scorer=indexer())
    assert_same_as_on_the_cpu(pattern, *operands(), P.Causal())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (16, 1), (14, 2)], ids=str)
@pytest.mark.parametrize("share", ["group", "all", "none"])
@pytest.mark.parametrize("scorer", [P.MeanPool(), P.MinMax()], ids=repr)
def test_sharing(kind: str, heads: tuple[int, int], share: str, scorer: P.Scorer) -> None:
    for unit_q in (1, 16):
        pattern = P.TopK(2, unit_kv=16, unit_q=unit_q, scorer=scorer, share=share)
        assert_same_as_on_the_cpu(pattern, *inputs(kind, heads), P.Causal())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(1, 100), (5, 75), (64, 64), (75, 40), (33, 1)], ids=str)
@pytest.mark.parametrize("unit_q", [1, 16, 32, 64, 128])
def test_lengths_and_units(kind: str, lengths: tuple[int, int], unit_q: int) -> None:
    for unit_kv in (1, 16, 64):
        for align in ("upper_left", "lower_right"):
            pattern = P.TopK(3, unit_kv=unit_kv, unit_q=unit_q, local=1, align=align)
            assert_same_as_on_the_cpu(pattern, *inputs(kind, (4, 2), *lengths), P.Causal(align))


def strange_scores() -> Tensor:
    """Equal scores, zeros of both signs, infinities, NaNs, and rows of one of them alone."""
    generator = torch.Generator().manual_seed(3)
    few = torch.tensor([-1.5, -0.0, 0.0, 0.5, 2.0, math.inf, -math.inf, math.nan])
    scores = few[torch.randint(len(few), (2, 2, 100, 7), generator=generator)]
    for row, value in enumerate((math.inf, -math.inf, math.nan, 0.0)):
        scores[:, :, row::11] = value
    return scores


@pytest.mark.parametrize("pattern", RULES, ids=repr)
def test_strange_scores(pattern: Any) -> None:
    scores = strange_scores()
    if pattern.block_kv == 32:
        scores = scores[..., :4]

    def scorer(q: Tensor, k: Tensor) -> Tensor:
        return scores.to(q.device)

    kept = ("unit_kv", "block", "sink", "local", "diagonal", "most")
    fields = {name: getattr(pattern, name) for name in kept}
    if isinstance(pattern, P.Threshold):
        fields["of"] = pattern.of
    value = next(getattr(pattern, n) for n in ("k", "ratio", "p", "t") if hasattr(pattern, n))
    strange = type(pattern)(value, scorer=scorer, **fields)
    for mask in (None, P.Causal(), P.SlidingWindow(9)):
        assert_same_as_on_the_cpu(strange, *operands(), mask)


LARGE = [
    # heads, queries and keys, width, unit_q, unit_kv, how many
    ((64, 4), 2048, 128, 1, 64, 16),
    ((16, 1), 3000, 64, 1, 64, 8),
    ((8, 8), 2048, 128, 1, 128, 8),
    ((32, 8), 2048, 128, 128, 128, 4),
    ((4, 2), 4096, 256, 64, 16, 32),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_the_best_are_kept(case: Any, dtype: torch.dtype) -> None:
    """Large problems: what is kept is better, in fp64, than what is not, up to rounding."""
    heads, n, dim, unit_q, unit, most = case
    torch.manual_seed(0)
    q, k = (torch.randn(1, h, n, dim, device=DEVICE).to(dtype) for h in heads)
    pattern = P.TopK(most, unit_kv=unit, unit_q=unit_q, diagonal=True)
    found = select_by(pattern, q, k, MaskExpr(KV <= Q))
    rows, units = -(-n // unit_q), -(-n // unit)
    kept = Selection(found.index, found.count, 1, 1).dense(rows, units)
    # Sums over the heads of a group and units of queries, before the product: it is linear.
    queries = by_units(q.double().view(1, heads[1], -1, n, dim).sum(2), unit_q)
    scores = queries @ by_units(k.double(), unit).mT / math.sqrt(dim)
    first = torch.arange(rows, device=DEVICE)[:, None] * unit_q
    last = (first + unit_q - 1).clamp(max=n - 1)
    at = torch.arange(units, device=DEVICE)
    visible, forced = at <= last // unit, (at >= first // unit) & (at <= last // unit)
    assert not bool((kept & ~visible).any())
    assert bool((kept | ~forced).all())
    wanted = torch.maximum(visible.sum(-1).clamp(max=most), forced.sum(-1)).to(torch.int32)
    assert torch.equal(found.count, wanted.expand(found.count.shape))
    worst = scores.masked_fill(~kept | forced, math.inf).amin(-1)
    left = scores.masked_fill(kept | ~visible, -math.inf).amax(-1)
    assert bool((worst > left - 1e-5 * scores.abs().amax()).all())


def by_units(rows: Tensor, unit: int) -> Tensor:
    """The mean of each run of ``unit`` rows, also of a short last one."""
    return torch.stack([part.mean(2) for part in rows.split(unit, 2)], 2)


WAYS = [*RULES, *SCORERS, P.MoBA(16, 3), P.NSASelection(16, 4, 16, 8)]


@pytest.mark.parametrize("pattern", WAYS, ids=repr)
def test_nothing_waits(pattern: Any) -> None:
    q, k = (t.to(DEVICE) for t in inputs("floats"))
    mask = P.Causal() & P.Documents(torch.arange(100, device=DEVICE) // 37)
    bound = mask.bound()
    tables = bound.tables(str(DEVICE), 100, 100, 2, 4)

    def run() -> Selection:
        return select_by(pattern, q, k, bound.expr, tables)

    run()  # compiles
    with no_waiting():
        run()


@pytest.mark.parametrize("pattern", WAYS, ids=repr)
def test_a_recorded_graph_follows_changed_operands(pattern: Any) -> None:
    q, k = (t.to(DEVICE) for t in inputs("floats"))
    causal = MaskExpr(KV <= Q)
    select_by(pattern, q, k, causal)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = select_by(pattern, q, k, causal)
    for seed in range(3):
        torch.manual_seed(seed)
        q.copy_(torch.randn(q.shape))
        k.copy_(torch.randn(k.shape))
        graph.replay()
        wanted = select_by(pattern, q, k, causal)
        assert torch.equal(found.dense(100, 100), wanted.dense(100, 100))


WINDOWED = [
    # heads, width, units of queries, scorer
    ((16, 1), 128, 1, P.OverlapPool()),
    ((32, 2), 64, 1, P.OverlapPool(64, 16)),
    ((6, 3), 80, 64, P.OverlapPool(32, 32)),
    ((4, 4), 128, 16, P.OverlapPool(64, 64)),
    ((8, 2), 256, 1, P.OverlapPool(16, 8)),
]
LOWER = P.Causal("lower_right")
WINDOW_MASKS = [
    None,
    P.Causal(),
    LOWER & P.SlidingWindow(700, align="lower_right"),
    LOWER & (P.SlidingWindow(200, align="lower_right") | P.Global(500)),
]


@pytest.mark.parametrize("mask", WINDOW_MASKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WINDOWED, ids=str)
def test_windows(case: Any, dtype: torch.dtype, mask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel scores as torch does, also where lengths are no multiples of tiles."""
    heads, dim, unit_q, scorer = case
    torch.manual_seed(0)
    lengths = (1000 if scorer.stride == 8 else 4133), 4159
    q, k = (
        torch.randn(2, h, n, dim, device=DEVICE).to(dtype)
        for h, n in zip(heads, lengths, strict=True)
    )
    pattern = P.TopK(16, unit_kv=64, unit_q=unit_q, scorer=scorer)
    task, builder = task_of(pattern, q, k, mask), BUILDERS.get(q.device)
    assert builder is not None
    assert builder.window_scores(windows_of(scorer, task)) is not None
    found = scoring(scorer, task).score(0, task.rows)
    serve_nothing(BUILDERS, monkeypatch)
    wanted = scoring(scorer, task).score(0, task.rows)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_windows_wait_for_nothing() -> None:
    q, k = (torch.randn(1, h, 700, 64, device=DEVICE).bfloat16() for h in (16, 1))
    pattern, causal = P.NSASelection(64, 4), MaskExpr(KV <= Q)
    select_by(pattern, q, k, causal)  # compiles
    with no_waiting():
        select_by(pattern, q, k, causal)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = select_by(pattern, q, k, causal)
    q.copy_(torch.randn(q.shape))
    graph.replay()
    wanted = select_by(pattern, q, k, causal)
    assert torch.equal(found.index, wanted.index)
    assert torch.equal(found.count, wanted.count)

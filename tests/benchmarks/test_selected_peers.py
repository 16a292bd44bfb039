"""The comparison of selected attention with its peers, on a machine without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # where a plain `pytest` does not look

from benchmarks import fla_peers, flex_selected, selected, selected_peers, selected_serving
from benchmarks.side_by_side import Problem, attempt, errors, measure
from sparse_compile.selection import Selection


@pytest.fixture(autouse=True)
def few_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 query heads, 2 of keys, of 16."""
    torch.manual_seed(0)
    for module in (selected, selected_peers, selected_serving):
        for name, value in (("Q_HEADS", 4), ("KV_HEADS", 2), ("DIM", 16)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(selected_serving, "INDEXER", (4, 16))
    monkeypatch.setattr(selected_serving, "LATENT", (4, 24, 16))


def per_query() -> Problem:
    return selected_peers.per_query(selected_peers.DRY, 256, 64, 3)


def per_block() -> Problem:
    return selected_peers.per_block(selected_peers.DRY, 2560)


def dense(p: Problem) -> torch.Tensor:
    """bool [Hs, N, N]: who attends to whom."""
    assert p.lists is not None
    n = p.q.shape[2]
    chosen = Selection(*p.lists, p.unit_q, p.unit_kv).dense(n, n)[0]
    return chosen & torch.ones(n, n, dtype=torch.bool).tril()


def test_every_case_runs(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    selected_peers.main(["--dry", "--out", str(out)])
    written = json.loads(out.read_text())
    rows: list[dict[str, Any]] = written["rows"]
    # FlexAttention has no backward without a GPU, nor does it like that one may be wanted.
    failed = {row.get("by", row["case"]).split(",")[0] for row in rows if "error" in row}
    assert failed <= {"flex"}
    assert written["problem"]["n"] == 256
    for row in rows:
        assert all(row[name] < 0.02 for name in row if name.endswith("_error"))
    assert {row.get("shared") for row in rows} == {None, 1.0}
    # Near scores may be told apart by their last bits.
    assert all(row["deficit"] < 0.02 for row in rows if "deficit" in row)


@pytest.mark.parametrize("make", [per_query, per_block])
def test_flex_is_given_the_same_pairs(make: Any) -> None:
    p = make()
    mask = (flex_selected.by_query if make is per_query else flex_selected.by_block)(p)
    n, wanted = p.q.shape[2], dense(p).repeat_interleave(p.group, 0)
    at = torch.arange(n)
    allowed = mask.mask_mod(
        torch.zeros((), dtype=torch.long), torch.arange(4)[:, None, None], at[:, None], at
    )
    blocks = mask.to_dense()[0].bool().repeat_interleave(128, 1).repeat_interleave(128, 2)
    assert torch.equal(allowed & blocks, wanted)
    full = mask.full_kv_num_blocks
    assert full is None or full[0, :, -1].tolist() == [1] * 4


def test_flex_is_right() -> None:
    p = per_query()
    call = flex_selected.flex(flex_selected.by_query(p), compiled=False)
    assert errors(p, call(*p.inputs))["out_error"] < 0.02


def test_fla_is_given_the_same_blocks() -> None:
    """Lists of a power of two of places, -1 in those not used, for each query."""
    p = per_block()
    index, count = fla_peers.block_lists(p)
    assert index.shape == (1, 2560, 2, 2)
    assert torch.equal((index >= 0).sum(-1), count)
    found = torch.zeros(2, 2560, 21, dtype=torch.bool)
    found.scatter_(2, torch.where(index < 0, 20, index)[0].transpose(0, 1).long(), True)
    causal = torch.ones(2560, 2560, dtype=torch.bool).tril()
    assert torch.equal(found[..., :20].repeat_interleave(128, 2) & causal, dense(p))


def test_errors_see_what_is_wrong() -> None:
    p = per_query()
    row = measure(p, lambda q, k, v: selected_peers.ours(p)(q, k, v) * 1.1)
    assert row["out_error"] > 0.05
    assert min(row[f"{name}_error"] for name in ("dq", "dk", "dv")) > 0.05


def test_where_a_time_wins_from() -> None:
    times = [(1, 5.0, 1.0), (2, 1.0, 2.0), (4, 3.0, 2.0), (8, 3.0, 4.0), (16, 3.0, 9.0)]
    rows = [{"n": n, "ours_ms": mine, "dense_ms": dense} for n, mine, dense in times]
    assert selected_peers.wins_from(rows, "ours_ms") == 8
    assert selected_peers.wins_from([*rows, {"n": 32, "error": "none"}], "ours_ms") is None


def test_pairs_and_what_fails() -> None:
    p = per_block()
    assert p.pairs == 2 * 128 * 128 * float(p.lists[1].sum()) if p.lists else False

    def fails() -> dict[str, Any]:
        raise ImportError("no such peer")

    row = attempt({"by": "peer"}, fails)
    assert row["error"].startswith("ImportError at test_selected_peers.py:")
    assert "no such peer" in row["error"]

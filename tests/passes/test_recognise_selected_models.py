"""Unmodified models with an indexer run without a mask or scores of all pairs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparse_compile
from sparse_compile.sites.plan import Plan
from tests.passes.rewritten import Rewritten, assert_same, trained
from tests.passes.sparse_models import KEPT, LAYERS, LENGTH, model, padding, tokens


@pytest.mark.parametrize(
    ("kind", "implementation", "side"),
    [
        ("deepseek_v32", "sdpa", "right"),
        ("deepseek_v32", "eager", "left"),
        ("glm_moe_dsa", "sdpa", "left"),
        ("glm_moe_dsa", "eager", "none"),
    ],
)
def test_training(kind: str, implementation: str, side: str) -> None:
    network = model(kind, implementation)
    given = {"input_ids": tokens(), **padding(side)}
    expected = trained(network, network, **given)
    program = Rewritten()
    assert_same(trained(program.compiled(network), network, **given), expected)
    assert [type(found) for found in program.decisions] == [Plan] * LAYERS[kind]
    for found in program.decisions:
        assert found.reason == (
            f"selected: top-k of {KEPT} indices, units of 1 query and 1 key; "
            "the scores of its indexer are computed some queries at a time"
        )
    assert program.squares(LENGTH) == []
    full = 2 if kind == "glm_moe_dsa" else 1
    called = program.targets()
    assert called.count("sparse_compile.attention.default") == LAYERS[kind]
    assert called.count("sparse_compile.canonical_selection.default") == full
    assert called.count("sparse_compile.indexed_topk.default") == full
    assert not [name for name in called if "topk" in name and "indexed" not in name]


def test_the_check_sees_masks_and_scores() -> None:
    network = model("deepseek_v32")
    program = Rewritten(rewrite=False)
    program.compiled(network)(tokens())
    assert len(program.squares(LENGTH)) > 10


def test_one_compilation_for_many_lengths() -> None:
    network = model("deepseek_v32").eval()
    program = Rewritten()
    fast = program.compiled(network, dynamic=True)
    with torch.no_grad():
        for length in (37, 61):
            torch.testing.assert_close(fast(tokens(length)).logits, network(tokens(length)).logits)
    assert len(program.graphs) == 1
    assert {found.executor for found in program.decisions} == {"selected"}


def test_report() -> None:
    report = sparse_compile.explain(model("glm_moe_dsa").eval(), tokens())
    assert report.rewritten == LAYERS["glm_moe_dsa"]
    assert {site.mask for site in report.sites} == {"kv <= q"}
    assert {site.executor for site in report.sites} == {"selected"}
    assert "selected: top-k of 8 indices, units of 1 query and 1 key" in str(report)


@pytest.mark.parametrize(
    ("implementation", "side"),
    [("sdpa", "none"), ("eager", "left")],
)
def test_blocks_of_keys(implementation: str, side: str) -> None:
    """MiniMax M3 selects blocks for each group of heads, by the highest score in a block."""
    network = model("minimax_m3", implementation)
    given = {"input_ids": tokens(), **padding(side)}
    # PyTorch's own CPU kernel is wrong about the gradient of rows that are masked by finfo.min.
    with sdpa_kernel(SDPBackend.MATH):
        expected = trained(network, network, **given)
    program = Rewritten()
    assert_same(trained(program.compiled(network), network, **given), expected)
    for found in program.decisions:
        assert isinstance(found, Plan)
        assert found.reason == (
            "selected: 2 indices, units of 1 query and 8 keys; "
            "the scores of its indexer are computed some queries at a time"
        )
    assert program.squares(LENGTH) == []
    called = program.targets()
    assert called.count("sparse_compile.block_scores.default") == LAYERS["minimax_m3"]


def test_blocks_of_keys_at_many_lengths() -> None:
    network = model("minimax_m3", layers=1).eval()
    program = Rewritten()
    fast = program.compiled(network, dynamic=True)
    with torch.no_grad():
        for length in (37, 61):
            torch.testing.assert_close(fast(tokens(length)).logits, network(tokens(length)).logits)
    assert {found.executor for found in program.decisions} == {"selected"}
    assert "sparse_compile.block_scores.default" in program.targets()

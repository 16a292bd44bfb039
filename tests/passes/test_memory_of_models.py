"""The memory that models with an indexer take, backward included, grows with the length alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_compile.ops import indexer as indexer_ops
from tests.passes.rewritten import Rewritten, trained
from tests.passes.sparse_models import model, tokens
from tests.passes.test_recognise_threshold import Indexed


def largest(call: Callable[[], Any]) -> int:
    """Bytes of the largest tensor that anything allocates, inside of operators, too."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


def growth(
    network: nn.Module,
    given_of: Callable[[int], Tensor],
    rewrite: bool = True,
    length: int = 512,
) -> float:
    """How much larger the largest tensor of a training step is at twice the length."""
    sizes = []
    for n in (length, 2 * length):
        fast, given = Rewritten(rewrite).compiled(network), given_of(n)
        trained(fast, network, given)  # tracing allocates what no call does
        sizes.append(largest(lambda fast=fast, given=given: trained(fast, network, given)))
    return sizes[1] / sizes[0]


@pytest.mark.parametrize(
    ("kind", "checkpointed"),
    [
        ("deepseek_v32", False),
        ("minimax_m3", True),
    ],
)
def test_it_grows_with_the_length(
    monkeypatch: pytest.MonkeyPatch, kind: str, checkpointed: bool
) -> None:
    monkeypatch.setattr(indexer_ops, "_MOST", 1 << 16)
    network = model(kind, layers=1)
    if checkpointed:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    assert growth(network, tokens) < 2.2


def test_without_the_passes_it_grows_with_the_square() -> None:
    assert growth(model("minimax_m3", layers=1), tokens, rewrite=False) > 3.5


@pytest.mark.parametrize("rewrite", [False, True])
def test_a_threshold_on_the_scores_of_all_keys(
    monkeypatch: pytest.MonkeyPatch, rewrite: bool
) -> None:
    monkeypatch.setattr(indexer_ops, "_MOST", 1 << 16)
    found = growth(Indexed(), lambda n: torch.randn(1, n, Indexed.WIDTH), rewrite, 512)
    assert found < 2.2 if rewrite else found > 3.5

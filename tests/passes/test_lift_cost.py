"""How much expression work lifting does, in steps counted, not in seconds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_compile
from sparse_compile.passes.lift import simplify
from sparse_compile.passes.lift.bounds import linear
from tests.passes.lifting import attend, lifted, refused


def shifted_windows(grid: int, window: int = 7, shift: int = 3) -> Tensor:
    """bool [windows, 1, tokens, tokens]: which tokens of a rolled grid were neighbours, as Swin."""
    place = torch.arange(grid)
    region = (place >= grid - window).long() + (place >= grid - shift).long()
    regions = region[:, None] * 3 + region
    side = grid // window
    tokens = regions.view(side, window, side, window).transpose(1, 2).reshape(-1, window**2)
    return (tokens.unsqueeze(1) == tokens.unsqueeze(2)).unsqueeze(1)


def windows(grid: int) -> Tensor:
    return torch.randn((grid // 7) ** 2, 1, 49, 4)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts of the two steps that lifting repeats most; nothing is remembered from elsewhere."""
    counts: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any) -> Any:
            counts[name] += 1
            return plain(*args)

        monkeypatch.setattr(owner, name, counted)

    count(simplify.Simplifier, "_rebuild")
    count(simplify._Facts, "settle")
    linear.cache_clear()
    return counts


def test_steps_do_not_grow_with_sizes(steps: Counter[str]) -> None:
    seen = []
    for grid in (28, 84):
        steps.clear()
        lifted(lambda x, grid=grid: attend(x, shifted_windows(grid)), windows(grid))
        seen.append(dict(steps))
    assert seen[0] == seen[1]


def test_each_comparison_is_brought_to_normal_form_once(steps: Counter[str]) -> None:
    lifted(lambda x: attend(x, shifted_windows(56)), windows(56))
    found = linear.cache_info()
    assert found.misses < found.maxsize, "what is forgotten is computed again"
    assert found.misses * 10 < found.hits + found.misses


def test_steps_do_not_grow_under_a_learned_bias(steps: Counter[str]) -> None:
    seen = []
    for grid in (28, 84):
        steps.clear()

        def program(x: Tensor, bias: Tensor, grid: int = grid) -> Tensor:
            return attend(x, bias.T + torch.where(shifted_windows(grid), 0.0, -100.0))

        found = lifted(program, windows(grid), torch.randn(49, 49, requires_grad=True))
        assert found.learned is not None
        assert found.learned.shown == (f"tensor [{(grid // 7) ** 2}, 1, 49, 49]",)
        seen.append(dict(steps))
    assert seen[0] == seen[1]


def test_what_is_computed_from_floating_data_is_still_told_apart() -> None:
    """A comparison of floating data is a mask, and what stands beside it is lifted."""

    def program(x: Tensor, scores: Tensor) -> Tensor:
        position = torch.arange(16)
        return attend(x, (scores * 2 > position) & (position[:, None] >= position))

    found = lifted(program, torch.randn(2, 1, 16, 4), torch.randn(16, 16))
    assert "kv <= q" in str(found.mask)
    assert len(found.dense) == 1


def test_a_bias_that_is_chosen_by_a_mask_is_a_bias_under_a_mask() -> None:
    def program(x: Tensor, bias: Tensor) -> Tensor:
        position = torch.arange(16)
        return attend(x, torch.where(position[:, None] >= position, bias, float("-inf")))

    x, bias = torch.randn(2, 1, 16, 4), torch.randn(16, 16)
    found = lifted(program, x, bias.requires_grad_())
    assert (str(found.mask), str(found.score)) == ("kv <= q", "score + w0(q, kv)")
    # Numbers that may be a mask's are none.
    assert "only known at run time" in refused(program, x, bias.detach()).reason


@pytest.mark.slow
def test_explain_of_swin_takes_seconds() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(embed_dim=24, depths=[2] * 4, num_heads=[1, 2, 4, 8])
    model = transformers.SwinModel(config)
    torch._dynamo.reset()
    start = time.process_time()
    report = sparse_compile.explain(model, pixel_values=torch.randn(1, 3, 224, 224))
    assert len(report.sites) == 8
    # Reading the masks is a tenth of this; the rest is Dynamo's, and other programs may run.
    assert time.process_time() - start < 20

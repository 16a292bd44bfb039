"""Masks in buffers of floating numbers, whose values only a call has: exact whatever they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.passes.idioms import INF, LOW, Compiled, D, H, N, assert_left, assert_rewritten
from tests.tolerance import relative_error

WINDOWS = 3


def numbers(fill: float) -> Tensor:
    """0 and a fill, by window; every query has a key."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.rand(WINDOWS, N, N, generator=generator) < 0.4
    hidden[:, :, 0] = False
    return torch.where(hidden, fill, 0.0)


def low_rows(fill: float) -> Tensor:
    """The same with rows that hold nothing but a fill, or several of them."""
    found = numbers(fill)
    found[1, 3] = fill
    found[2, 5] = LOW
    found[2, 5, 7] = -INF
    found[2, 6] = -3e38
    found[2, 6, 4:9] = -2e38
    return found


class Swin(nn.Module):
    """timm's shifted windows: a bias by position that is trained, and a mask by window."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("attn_mask", mask)
        generator = torch.Generator().manual_seed(2)
        self.table = nn.Parameter(torch.randn(H, N, N, generator=generator))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * 0.25 + self.table[None]
        scores = scores.view(-1, WINDOWS, H, N, N) + self.attn_mask[None, :, None]
        return scores.view(-1, H, N, N).softmax(-1) @ v


class Fused(Swin):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.attn_mask.view(1, WINDOWS, 1, N, N).expand(len(q) // WINDOWS, -1, H, -1, -1)
        mask = self.table[None] + mask.reshape(-1, H, N, N)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def windows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = 2 * WINDOWS, H, N, D
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]


def results(module: Swin, run: nn.Module | Compiled, given: list[Tensor]) -> list[Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        out = run(*given)
        loss = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
        grads = torch.autograd.grad((out * loss).sum(), [*given, module.table])
    return [out.detach(), *grads]


def assert_equal(module: Swin, fast: Compiled, given: list[Tensor]) -> None:
    for ours, truth in zip(
        results(module, fast, given), results(module, module, given), strict=True
    ):
        assert torch.equal(ours.isnan(), truth.isnan())
        assert relative_error(ours.nan_to_num(), truth.nan_to_num()) <= 1e-5


@pytest.mark.parametrize("kind", [Swin, Fused])
@pytest.mark.parametrize("mask", [numbers(-100.0), numbers(-INF), low_rows(LOW), low_rows(-100.0)])
def test_windows(kind: type[Swin], mask: Tensor) -> None:
    module, given = kind(mask), windows()
    fast = Compiled(module)
    assert_equal(module, fast, given)
    (site,) = fast.sites
    assert site.rewritten
    assert site.mask.startswith("not tensor [6, ")


def test_values_that_change() -> None:
    """No guard is on them; what was a bias is a mask in the next call."""
    module, given = Swin(numbers(-100.0)), windows()
    fast = Compiled(module)
    for mask in (numbers(-100.0), low_rows(LOW), numbers(1.0), numbers(-INF)):
        module.attn_mask.copy_(mask)
        assert_equal(module, fast, given)
    assert len(fast.sites) == 1


class Rows(nn.Module):
    """A mask of keys in a buffer, and nothing that is trained."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("hidden", mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + self.hidden).softmax(-1) @ v


def test_rows_of_which_nothing_is_left() -> None:
    """All -inf is NaN, and so are the gradients of what they are made of."""
    given = [x[:1] for x in windows()]
    mask = numbers(-INF)[0]
    mask[5] = -INF
    module = Rows(mask)
    fast = Compiled(module)
    found = []
    for run in (fast, module):
        out = run(*given)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), given)])
    for ours, truth in zip(*found, strict=True):
        assert truth.isnan().any()
        assert torch.equal(ours.isnan(), truth.isnan())
        assert relative_error(ours.nan_to_num(), truth.nan_to_num()) <= 1e-5


def test_keys_alone() -> None:
    mask = torch.where(torch.arange(N) < 9, LOW, 0.0)
    assert assert_rewritten(Rows(mask), *windows()).mask == "t0[kv] != 0"


# What is left, and why ------------------------------------------------------------------------


def test_beside_another_mask() -> None:
    """Which of the buffer's numbers is the best may depend on what the other mask hides."""

    class Both(Rows):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = (q @ k.mT).masked_fill(torch.arange(N) > 30, LOW)
            return (scores + self.hidden).softmax(-1) @ v

    assert_left("masks several times", Both(numbers(-100.0)[0]), *windows())


def test_in_a_curve() -> None:
    class Capped(Rows):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.tanh(q @ k.mT + self.hidden).softmax(-1) @ v

    assert "bool mask" in assert_left("may be a mask", Capped(numbers(-1.0)[0]), *windows()).hint


def test_in_float16() -> None:
    """Whose least number absorbs no scores."""
    given = [x.detach().half() for x in windows()]
    assert_left("may be a mask", Rows(numbers(-100.0)[0]).half(), *given)


def test_an_input() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        return (q @ k.mT + hidden).softmax(-1) @ v

    assert_left("only known at run time", program, *windows(), numbers(-100.0)[0])

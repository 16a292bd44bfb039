"""Layers under activation checkpointing are rewritten inside it, selected keys included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_compile.sites.plan import Plan
from sparse_compile.sites.site import Rejection
from tests.passes.rewritten import Rewritten, assert_same, trained
from tests.passes.sparse_models import LAYERS, LENGTH, model, padding, tokens


@pytest.mark.parametrize(
    ("kind", "reentrant", "side"),
    [
        ("deepseek_v32", True, "none"),
        ("glm_moe_dsa", False, "left"),
        ("minimax_m3", False, "right"),
    ],
)
def test_models(kind: str, reentrant: bool, side: str) -> None:
    network = model(kind)
    network.gradient_checkpointing_enable({"use_reentrant": reentrant})
    given = {"input_ids": tokens(), **padding(side)}
    expected = trained(network, network, **given)
    program = Rewritten()
    assert_same(trained(program.compiled(network), network, **given), expected)
    assert [type(found) for found in program.decisions] == [Plan] * LAYERS[kind]
    assert program.squares(LENGTH) == []
    # Once in the forward, and again where the backward computes the layer anew.
    called = program.targets()
    assert called.count("sparse_compile.attention.default") == 2 * LAYERS[kind]


class Layer(nn.Module):
    """Attends to the keys that score best, among those that a tensor from outside allows."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        self.qkv, self.nested = nn.Linear(16, 48), nested

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        if self.nested:
            attended: Any = checkpoint(self.attend, x, allowed, use_reentrant=False)
            return x + attended
        return x + self.attend(x, allowed)

    def attend(self, x: Tensor, allowed: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT).masked_fill(~allowed, -torch.inf)
        index = scores.topk(4, -1).indices
        named = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=named & allowed)
        return out.transpose(1, 2).flatten(2)


class Layers(nn.Module):
    """Layers that share a mask that is made of padding, outside their checkpoints."""

    def __init__(self, write: str = "", nested: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(nested), Layer(nested)])
        self.write = write

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        length = x.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        allowed = causal & real[:, None, None, :]
        if self.write == "later":
            real.zero_()
        for layer in self.layers:
            x = checkpoint(layer, x, allowed, use_reentrant=False)
        return x


def inputs(length: int = 37) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    real = torch.ones(2, length, dtype=torch.bool)
    real[1, -5:] = False
    return [torch.randn(2, length, 16, generator=generator), real]


@pytest.mark.parametrize(("nested", "dynamic"), [(False, False), (True, True)])
def test_a_mask_from_outside(nested: bool, dynamic: bool) -> None:
    torch.manual_seed(0)
    network, program = Layers(nested=nested), Rewritten()
    fast = program.compiled(network, dynamic)
    for length in (37, 41) if dynamic else (37,):
        x, real = inputs(length)
        assert_same(trained(fast, network, x, real), trained(network, network, x, real))
    assert {found.executor for found in program.decisions if isinstance(found, Plan)} == {
        "selected"
    }


def test_what_a_mask_was_made_of_is_overwritten() -> None:
    torch.manual_seed(0)
    network, program = Layers(write="later"), Rewritten()
    x, real = inputs()
    found = trained(program.compiled(network), network, x, real.clone())
    assert_same(found, trained(network, network, x, real.clone()))
    for decision in program.decisions:
        assert isinstance(decision, Rejection)
        assert "the mask inside a checkpoint reads l_real_, which the model writes to" in (
            decision.reason
        )

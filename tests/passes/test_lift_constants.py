"""Constants of a graph in the computation of a mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.idioms import INF, LOW, N, assert_left, assert_rewritten, causal, qkv


@torch.compiler.assume_constant_result
def drawn() -> Tensor:
    """A mask that Dynamo takes for a constant: bool [N, N], each query sees itself."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(N, N, generator=generator) < 0.3
    return kept | torch.eye(N, dtype=torch.bool)


@torch.compiler.assume_constant_result
def drawn_of_keys() -> Tensor:
    return torch.arange(N) % 3 != 1


@torch.compiler.assume_constant_result
def drawn_numbers() -> Tensor:
    return torch.where(drawn(), 0.0, LOW)


def test_a_constant_mask() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~(drawn() & causal()), -INF).softmax(-1) @ v

    assert assert_rewritten(program, *qkv()).mask == "kv <= q and tensor [1, 1, 40, 40]"


def test_a_constant_by_key() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, drawn_of_keys() & causal())

    assert assert_rewritten(program, *qkv()).mask == "kv <= q and t0[kv] != 0"


def test_a_constant_of_floating_numbers() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + drawn_numbers()).softmax(-1) @ v

    assert assert_rewritten(program, *qkv()).mask == "not tensor [1, 1, 40, 40]"


def test_a_constant_that_is_written_to() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = drawn()
        keep[0] = True
        return F.scaled_dot_product_attention(q, k, v, keep)

    assert_left("which the model writes to before", program, *qkv())


def test_a_number_beside_other_indices() -> None:
    """The table is read at a constant, which comes after others that index."""

    def program(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        at = torch.arange(N)
        keep = seen[torch.arange(4)[:, None], at // 8, torch.ones(1, N, dtype=torch.int64)]
        return F.scaled_dot_product_attention(q, k, v, keep[None, :, None])

    seen = torch.arange(4 * 5 * 2).view(4, 5, 2) % 3 != 2
    assert assert_rewritten(program, *qkv(), seen).mask == "t0[h, kv] != 0"

"""Dense masks of many shapes and memory layouts, and what a pass over one must find."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DenseCase:
    """A mask made of rectangles, so that it has blocks of every kind."""

    n_q: int
    n_kv: int
    block: tuple[int, int] = (16, 32)
    batches: int = 1
    heads: int = 1
    memory: str = "contiguous"
    dtype: torch.dtype = torch.bool
    bias: float | None = None

    def __str__(self) -> str:
        words = [self.n_q, self.n_kv, *self.block, self.batches, self.heads, self.memory]
        return "-".join(map(str, [*words, str(self.dtype).removeprefix("torch."), self.bias]))

    def mask(self, device: torch.device) -> Tensor:
        """The mask [batches, heads, n_q, n_kv]."""
        generator = torch.Generator().manual_seed(self.n_q * 1000 + self.n_kv)
        shape = (self.batches, self.heads, self.n_q, self.n_kv)
        q, kv = torch.arange(self.n_q)[:, None], torch.arange(self.n_kv)
        mask = ((q // 24 + kv // 48) % 3 != 0) & (torch.rand(shape, generator=generator) < 0.999)
        mask = mask | (kv == q)
        additive = torch.zeros(shape, dtype=torch.float32).masked_fill(~mask, float("-inf"))
        if self.bias is not None:
            additive[..., -1, -1] = self.bias
        mask = mask if self.dtype == torch.bool else additive.to(self.dtype)
        return _in_memory(mask.to(device), self.memory)


def _in_memory(mask: Tensor, memory: str) -> Tensor:
    """The same mask with other strides."""
    if memory == "transposed":
        return mask.mT.contiguous().mT
    if memory == "strided":
        return mask.repeat_interleave(2, -1)[..., ::2]
    if memory == "offset":
        return torch.nn.functional.pad(mask, (1, 2))[..., 1:-2]
    if memory == "expanded":
        return mask[:1, :, :1].expand(mask.shape)
    return mask


CASES = [
    DenseCase(64, 128),
    DenseCase(96, 192, batches=2, heads=3),
    DenseCase(50, 100, heads=2),
    DenseCase(33, 97, batches=2),
    DenseCase(1, 130),
    DenseCase(70, 1),
    DenseCase(40, 256, block=(8, 128)),
    DenseCase(40, 60, block=(2, 64)),
    DenseCase(48, 96, memory="transposed", heads=2),
    DenseCase(48, 96, memory="strided"),
    DenseCase(48, 96, memory="offset"),
    DenseCase(48, 96, memory="expanded", batches=2, heads=2),
    DenseCase(50, 90, dtype=torch.float32, batches=2),
    DenseCase(50, 90, dtype=torch.float16),
    DenseCase(50, 90, dtype=torch.float32, bias=0.5),
    DenseCase(50, 90, dtype=torch.float32, bias=float("nan"), memory="transposed"),
    DenseCase(50, 90, dtype=torch.float16, bias=-60000.0),
]


def expected_kinds(attends: Tensor, block: tuple[int, int]) -> Tensor:
    """EMPTY, PARTIAL or FULL of every block, one block at a time."""
    batches, heads, n_q, n_kv = attends.shape
    (block_q, block_kv), flat = block, attends.flatten(0, 1).cpu()
    kinds = torch.zeros(batches * heads, -(-n_q // block_q), -(-n_kv // block_kv)).to(torch.int8)
    for c, r, k in torch.ones_like(kinds).nonzero().tolist():
        q, kv = r * block_q, k * block_kv
        tile = flat[c, q : q + block_q, kv : kv + block_kv]
        kinds[c, r, k] = int(tile.any()) + int(tile.sum() == block_q * block_kv)
    return kinds


def expected_bits(words: Tensor, n_kv: int) -> Tensor:
    """The bools that words spell, and that nothing stands behind them."""
    bits = (words.cpu()[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
    bits = bits.flatten(-2)
    assert not bits[..., n_kv:].any()
    return bits[..., :n_kv].bool()


def check_pass(found: tuple[Tensor, Tensor, Tensor], mask: Tensor, block: tuple[int, int]) -> None:
    """``(words, kinds, biased)`` against the definition."""
    words, kinds, biased = found
    attends = mask if mask.dtype == torch.bool else mask != float("-inf")
    assert torch.equal(expected_bits(words, mask.shape[-1]), attends.flatten(0, 1).cpu())
    assert torch.equal(kinds.cpu(), expected_kinds(attends, block))
    strange = mask.dtype != torch.bool and bool((attends & (mask != 0)).any())
    assert bool(biased.item()) == strange

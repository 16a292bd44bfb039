"""Biases of xFormers: stand-ins with its names and attributes, and what they materialize."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sparse_compile.errors import BadPattern
from sparse_compile.layout.interop.xformers_bias import from_xformers
from sparse_compile.patterns import Causal, Documents, Pattern, SlidingWindow

Shape = tuple[int, ...]


def band(shape: Shape, left: int, right: int, shift: int = 0) -> Tensor:
    """-inf outside ``q + shift - left <= kv <= q + shift + right``."""
    q, kv = torch.arange(shape[-2])[:, None] + shift, torch.arange(shape[-1])
    inside = (q - left <= kv) & (kv <= q + right)
    return torch.zeros(shape).masked_fill(~inside, -math.inf)


class AttentionBias:
    def materialize(self, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        raise NotImplementedError


class LowerTriangularMask(AttentionBias):
    def materialize(self, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        return band(shape, 10**6, 0)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    def materialize(self, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        return super().materialize(shape) + 0.5


class Renamed(LowerTriangularMask):
    """A user's subclass that changes nothing."""


class LowerTriangularFromBottomRightMask(AttentionBias):
    def materialize(self, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        return band(shape, 10**6, 0, shape[-1] - shape[-2])


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    _window_size: int

    def materialize(self, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        return band(shape, self._window_size - 1, 0, shape[-1] - shape[-2])


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    window_left: int
    window_right: int

    def materialize(self, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        return band(shape, self.window_left, self.window_right, shape[-1] - shape[-2])


class _SeqLenInfo:
    def __init__(self, *lengths: int) -> None:
        self.seqstart = torch.tensor([0, *lengths]).cumsum(0).int()
        self.seqstart_py = self.seqstart.tolist()


class _OldSeqLenInfo:
    def __init__(self, *lengths: int) -> None:
        self.cu_seqlen_py = torch.tensor([0, *lengths]).cumsum(0).tolist()


class _PaddedSeqLenInfo(_SeqLenInfo):
    def __init__(self, padding: int, *lengths: int) -> None:
        super().__init__(*(padding for _ in lengths))
        self.seqlen = torch.tensor(lengths)


@dataclass
class BlockDiagonalMask(AttentionBias):
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo

    def _create_block_mask(self, shape: Shape) -> Tensor:
        return torch.zeros(shape)

    def materialize(self, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        mask = torch.full(shape, -math.inf)
        starts, key_starts = self.q_seqinfo.seqstart_py, self.k_seqinfo.seqstart_py
        for i, (q, kv) in enumerate(zip(starts[:-1], key_starts[:-1], strict=True)):
            place = slice(q, starts[i + 1]), slice(kv, key_starts[i + 1])
            mask[place] = self._create_block_mask(tuple(mask[place].shape))
        return mask


class BlockDiagonalCausalMask(BlockDiagonalMask):
    def _create_block_mask(self, shape: Shape) -> Tensor:
        return band(shape, 10**6, 0)


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    def _create_block_mask(self, shape: Shape) -> Tensor:
        return band(shape, 10**6, 0, shape[-1] - shape[-2])


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    _window_size: int = 0

    def _create_block_mask(self, shape: Shape) -> Tensor:
        return band(shape, self._window_size - 1, 0)


class BlockDiagonalPaddedKeysMask(AttentionBias):
    def materialize(self, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        return band(shape, 2, 2)


ONE, OTHER = _SeqLenInfo(3, 0, 4), _SeqLenInfo(2, 1, 6)
PATTERNS: list[tuple[AttentionBias, Pattern, Shape]] = [
    (LowerTriangularMask(), Causal(), (5, 7)),
    (Renamed(), Causal(), (5, 7)),
    (LowerTriangularFromBottomRightMask(), Causal("lower_right"), (5, 7)),
    (
        LowerTriangularFromBottomRightLocalAttentionMask(3),
        SlidingWindow(2, 0, "lower_right"),
        (5, 7),
    ),
    (LocalAttentionFromBottomRightMask(1, 2), SlidingWindow(1, 2, "lower_right"), (5, 7)),
    (LocalAttentionFromBottomRightMask(0, 2), SlidingWindow(0, 2, "lower_right"), (7, 5)),
    (BlockDiagonalMask(ONE, ONE), Documents(cu_seqlens=(0, 3, 3, 7)), (7, 7)),
    (
        BlockDiagonalCausalMask(ONE, _SeqLenInfo(3, 0, 4)),
        Documents(cu_seqlens=(0, 3, 3, 7)) & Causal(),
        (7, 7),
    ),
    (
        BlockDiagonalCausalFromBottomRightMask(ONE, ONE),
        Documents(cu_seqlens=(0, 3, 3, 7)) & Causal(),
        (7, 7),
    ),
    (
        BlockDiagonalCausalLocalAttentionMask(ONE, ONE, 2),
        Documents(cu_seqlens=(0, 3, 3, 7)) & SlidingWindow(1, 0),
        (7, 7),
    ),
]


@pytest.mark.parametrize(("bias", "pattern", "shape"), PATTERNS)
def test_biases_that_are_patterns(bias: AttentionBias, pattern: Pattern, shape: Shape) -> None:
    assert from_xformers(bias) == pattern
    assert torch.equal(pattern.dense(*shape)[0, 0], bias.materialize(shape) == 0)


def test_documents_of_other_lengths_for_queries_and_keys() -> None:
    pattern = from_xformers(BlockDiagonalMask(ONE, OTHER))
    assert isinstance(pattern, Documents)
    dense = pattern.dense(7, 9)[0, 0]
    assert torch.equal(dense, BlockDiagonalMask(ONE, OTHER).materialize((7, 9)) == 0)


def test_the_sequence_lengths_of_older_releases() -> None:
    info = _OldSeqLenInfo(3, 4)
    assert from_xformers(BlockDiagonalMask(info, info)) == Documents(cu_seqlens=(0, 3, 7))


DENSE: list[tuple[AttentionBias, Shape]] = [
    (LocalAttentionFromBottomRightMask(0, 0), (5, 7)),
    (LowerTriangularFromBottomRightLocalAttentionMask(1), (5, 7)),
    (BlockDiagonalCausalMask(ONE, OTHER), (7, 9)),
    (BlockDiagonalCausalLocalAttentionMask(ONE, OTHER, 2), (7, 9)),
    (BlockDiagonalPaddedKeysMask(), (5, 7)),
    (BlockDiagonalMask(_SeqLenInfo(2, 2), _PaddedSeqLenInfo(3, 2, 1)), (4, 6)),
]


@pytest.mark.parametrize(("bias", "shape"), DENSE)
def test_other_biases_become_dense(bias: AttentionBias, shape: Shape) -> None:
    found = from_xformers(bias, shape)
    assert torch.is_tensor(found)
    assert torch.equal(found, bias.materialize(shape) == 0)
    with pytest.raises(BadPattern, match=r"from_xformers\(bias, \(n_q, n_kv\)\)"):
        from_xformers(bias)


def test_a_subclass_that_adds_something_is_not_its_base() -> None:
    with pytest.raises(BadPattern, match="adds values"):
        from_xformers(LowerTriangularMaskWithTensorBias(), (4, 4))
    with pytest.raises(BadPattern, match="no attention bias"):
        from_xformers(object(), (4, 4))

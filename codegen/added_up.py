"""Numbers added up by index, in the same order each time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def added_up(numbers: Tensor, indices: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Zeros of some sizes to which ``numbers`` were added at ``indices``.

    They are sorted by where they belong first, and what is added to one element is added up in
    parallel and in a fixed order: many numbers at one place take no longer than at many places, and
    the last bits are the same each time, as with neither ``index_add`` nor ``index_put``.

    Args:
        numbers: fp32 or fp64.
        indices: as many as there are sizes, each within its size; they broadcast to ``numbers``.
        sizes: of the result.

    >>> added_up(torch.tensor([1.0, 2.0, 4.0]), [torch.tensor([1, 0, 1])], [3])
    tensor([2., 5., 0.])
    """
    place = torch.zeros((), dtype=torch.int64, device=numbers.device)
    for index, size in zip(indices, sizes, strict=True):
        place = place * size + index
    given = numbers.reshape(-1, 1), place.expand(numbers.shape).flatten()
    found: Tensor = torch.ops.aten.embedding_dense_backward(*given, math.prod(sizes), -1, False)
    return found.reshape(list(sizes))

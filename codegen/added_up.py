"""Numbers added up by index, in the same order each time.

``index_add`` adds up in any order, and so does the gradient of an embedding: on an H200 that of a
table of 32 rows differed from run to run, though it sorts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Numbers are added up in so many parts, side by side, each of at least as many numbers.
_PARTS = 256
#: Elements that the results of all parts may have together.
_MOST = 1 << 22


def added_up(numbers: Tensor, indices: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Zeros of some sizes to which ``numbers`` were added at ``indices``.

    What belongs to one element is sorted together and added up in that order, so the last bits are
    the same each time. On a GPU that is done one number after the other: many at one place would
    take long, so each part of the numbers has a result of its own first.

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
    flat, place = numbers.flatten(), place.expand(numbers.shape).flatten()
    total = math.prod(sizes)
    parts = max(1, min(_PARTS, _MOST // max(total, 1), flat.numel() // _PARTS))
    if parts > 1:
        # Neighbours tend to belong together, so they go to different parts.
        place = place + torch.arange(flat.numel(), device=flat.device) % parts * total
    found = flat.new_zeros(parts * total).index_put_((place,), flat, accumulate=True)
    return found.view(parts, *sizes).sum(0) if parts > 1 else found.view(list(sizes))

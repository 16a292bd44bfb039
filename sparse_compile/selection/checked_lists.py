"""check_lists: whether lists of units are what kernels take for granted."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.patterns.checks import bad


def check_lists(index: Tensor, count: Tensor, units: int) -> None:
    """Raise unless the lists are those of a :class:`sparse_compile.selection.Selection`.

    It looks at the values, and so waits for the device. Attention over selected keys calls it on
    the CPU, where nothing is waited for; on a GPU its kernels read what the lists say.

    Args:
        index: int32 [B, Hs, Uq, K].
        count: int32 [B, Hs, Uq].
        units: how many units of keys there are.

    Raises:
        BadPattern: naming the first entry that is out of range, repeated or not ascending.

    >>> check_lists(torch.tensor([[[[0, 2, 7]]]]), torch.tensor([[[2]]]), 3)
    >>> check_lists(torch.tensor([[[[2, 0, 7]]]]), torch.tensor([[[2]]]), 3)
    Traceback (most recent call last):
    sparse_compile.errors.BadPattern: sparse_compile: a selection lists unit 0 at [0, 0, 0, 1], \
after unit 2. Pass what selection.canonical(index, units) returns, with units=3.
    """
    most = index.shape[-1]
    wrong = (count < 0) | (count > most)
    if bool(wrong.any()):
        at = _first(wrong)
        what = f"a selection counts {int(count[at])} of {most} units at {list(at)}"
        raise bad(what, _instead(units))
    used = torch.arange(most, device=index.device) < count[..., None]
    wrong = used & ((index < 0) | (index >= units))
    if bool(wrong.any()):
        at = _first(wrong)
        what = f"a selection lists unit {int(index[at])} at {list(at)}, but there are {units}"
        raise bad(what, _instead(units))
    wrong = used[..., 1:] & (index[..., 1:] <= index[..., :-1])
    if bool(wrong.any()):
        *row, place = _first(wrong)
        before, unit = index[(*row, place)], index[(*row, place + 1)]
        what = (
            f"a selection lists unit {int(unit)} at {[*row, place + 1]}, after unit {int(before)}"
        )
        raise bad(what, _instead(units))


def _first(wrong: Tensor) -> tuple[int, ...]:
    """Where the first True is."""
    return tuple(wrong.nonzero()[0].tolist())


def _instead(units: int) -> str:
    return f"Pass what selection.canonical(index, units) returns, with units={units}."

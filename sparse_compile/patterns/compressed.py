"""Compressed: a scorer whose compressed keys the model made itself, as those of NSA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from sparse_compile.patterns.checks import bad, optional, store
from sparse_compile.patterns.data import HoldsData, is_tensor
from sparse_compile.patterns.scored import real
from sparse_compile.patterns.scorers import OverlapPool, Scorer


def whole_windows(n: int, window: int, stride: int) -> int:
    """How many windows of ``window`` tokens, one each ``stride``, lie entirely among ``n`` tokens.

    >>> whole_windows(64, 32, 16), whole_windows(31, 32, 16)
    (3, 0)
    """
    # No `max`: torch.compile would make it a condition on lengths that it knows by name only.
    return 0 if n < window else (n - window) // stride + 1


@dataclass(frozen=True, repr=False, eq=False)
class Compressed(HoldsData, Scorer):
    """:class:`OverlapPool` with given keys of its windows, in the place of the means of keys.

    The selection of Native Sparse Attention (Yuan et al. 2025, https://arxiv.org/abs/2502.11089,
    equations 8 to 10) with its learned compression. Unlike those of :class:`OverlapPool`, all
    windows are whole: the last keys, which no whole window covers, count for nothing. Keys of
    the dtype of the queries are exact in the kernel that is mentioned there.

    Args:
        keys: [B, Hc, Nc, D], floating; Hc divides the query heads, and ``Nc`` is the number of
            whole windows, ``(Nkv - window) // stride + 1``. No gradient reaches it.
        window, stride: as for :class:`OverlapPool`.
        scale: factor on the products of queries and compressed keys; 1 / sqrt(D) unless given.
    """

    tensors = ("keys",)

    keys: Any
    window: int = 32
    stride: int = 16
    scale: Annotated[float | None, optional(real)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_tensor(self.keys) or not self.keys.is_floating_point() or self.keys.dim() != 4:
            raise bad("Compressed: keys is no floating tensor [B, Hc, Nc, D]", "Pass one.")
        windows = OverlapPool(self.window, self.stride)
        store(self, window=windows.window, stride=windows.stride)

    def check_units(self, unit_q: int, block: int) -> None:
        """The stride must divide a block."""
        OverlapPool(self.window, self.stride).check_units(unit_q, block)

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """There must be a key for each whole window."""
        shape, windows = list(self.keys.shape), whole_windows(n_kv, self.window, self.stride)
        if (shape[0], shape[2]) != (batch, windows) or shape[1] < 1 or heads % shape[1]:
            raise bad(
                f"Compressed: keys {shape} for a batch of {batch}, {heads} query heads and {n_kv} "
                f"keys in windows of {self.window}, one each {self.stride}",
                f"Pass [{batch}, heads, {windows}, D], where heads divides {heads}.",
            )

"""NSA: the settings of Native Sparse Attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sparse_compile.patterns.checks import UPPER_LEFT, Align, store, whole_from
from sparse_compile.patterns.compressed import whole_windows
from sparse_compile.patterns.learned import NSASelection
from sparse_compile.patterns.local import SlidingWindow
from sparse_compile.patterns.parameters import Parameters
from sparse_compile.patterns.rules import TopK
from sparse_compile.patterns.scorers import OverlapPool


@dataclass(frozen=True, repr=False)
class NSA(Parameters):
    """Native Sparse Attention: attention to compressed, to selected and to near keys.

    Yuan et al. 2025, https://arxiv.org/abs/2502.11089. What
    :func:`sparse_compile.native_sparse_attention` computes; the defaults are those of the paper. It
    is no mask, but the sum of three attentions: :func:`NSASelection` is the mask of the second
    alone.

    Args:
        length, stride: keys of a compressed key, and from the start of one to that of the next.
        block: keys of a block that is selected; the stride divides it.
        k: how many blocks, forced ones among them.
        sink, local: forced blocks at the start, and up to the query's own.
        window: how many tokens the sliding window has, the query's own among them; 2 or more.
        align: the corner in which the diagonal starts, see :class:`Causal`; "lower_right" for the
            last queries of a longer sequence, as in decoding.

    >>> NSA(), NSA(k=32, window=256)
    (NSA(), NSA(k=32, window=256))
    """

    length: int = 32
    stride: int = 16
    block: int = 64
    k: int = 16
    sink: int = 1
    local: int = 2
    window: Annotated[int, whole_from(2)] = 512
    align: Align = UPPER_LEFT

    def __post_init__(self) -> None:
        super().__post_init__()
        pool = OverlapPool(self.length, self.stride)
        store(self, length=pool.window, stride=pool.stride)
        chosen = self.selection
        store(self, block=chosen.block_kv, k=chosen.k, sink=chosen.sink, local=chosen.local)

    @property
    def selection(self) -> TopK:
        """The pattern of the selected branch, with means as compressed keys."""
        counts = self.block, self.k, self.length, self.stride, self.sink, self.local
        return NSASelection(*counts, align=self.align)

    @property
    def near(self) -> SlidingWindow:
        """The mask of the sliding window."""
        return SlidingWindow(self.window - 1, 0, self.align)

    def compressed(self, n_kv: int) -> int:
        """How many compressed keys ``n_kv`` keys make.

        >>> NSA().compressed(64)
        3
        """
        return whole_windows(n_kv, self.length, self.stride)

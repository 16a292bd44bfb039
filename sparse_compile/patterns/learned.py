"""Published selections by name, with their published settings, and the settings of NSA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from sparse_compile.patterns.checks import (
    LOWER_RIGHT,
    UPPER_LEFT,
    Align,
    bad,
    store,
    whole,
    whole_from,
)
from sparse_compile.patterns.local import SlidingWindow
from sparse_compile.patterns.parameters import Parameters
from sparse_compile.patterns.scored import UNITS, Threshold, TopK, TopP
from sparse_compile.patterns.scorers import (
    Antidiagonal,
    Gate,
    Indexer,
    MeanPool,
    MinMax,
    OverlapPool,
    whole_windows,
)


def MoBA(block: int = 512, k: int = 3) -> TopK:
    """Mixture of Block Attention: each query of each head attends to its own block and others.

    Lu et al. 2025, https://arxiv.org/abs/2502.13189.

    Args:
        block: keys of a block.
        k: how many blocks, the query's own among them.

    >>> MoBA()
    TopK(3, unit_kv=128, block=512, diagonal=True, share='none')
    """
    blocks = _parted("MoBA", block)
    return TopK(k, scorer=MeanPool(), diagonal=True, share="none", **blocks)


def Quest(k: int, page: int = 16) -> TopK:
    """Quest: each query of each head attends to the pages whose keys could match it best.

    Tang et al. 2024, https://arxiv.org/abs/2406.10774, for decoding: the queries are the last
    tokens. The page of the query is always among them. The paper leaves its first two layers dense.

    Args:
        k: how many pages: the budget of tokens divided by ``page``.
        page: keys of a page.
    """
    pages = _parted("Quest", page)
    return TopK(k, scorer=MinMax(), local=1, share="none", align=LOWER_RIGHT, **pages)


def XAttention(stride: int = 16, threshold: float = 0.9, block: int = 128) -> TopP:
    """XAttention: blocks that hold ``threshold`` of the attention along antidiagonals.

    Xu et al. 2025, https://arxiv.org/abs/2503.16428. Each head selects for blocks of queries; the
    first block and the one on the diagonal are always among them.

    Args:
        stride: of the antidiagonals, 8 or 16 in the paper.
        threshold: the share of the attention.
        block: queries and keys of a block.
    """
    return TopP(
        threshold,
        unit_kv=block,
        unit_q=block,
        scorer=Antidiagonal(stride),
        sink=1,
        diagonal=True,
        share="none",
    )


def SeerAttention(
    gate: Callable[[Any, Any], Any],
    block: int = 64,
    k: int | None = None,
    threshold: float | None = None,
) -> TopK | Threshold:
    """SeerAttention: blocks that a learned gate opens, for each head and block of queries.

    Gao et al. 2024, https://arxiv.org/abs/2410.13276.

    Args:
        gate: see :class:`Gate`; its scores are logits.
        block: queries and keys of a block.
        k: how many blocks; or
        threshold: those whose gate, after a softmax, is so much or more.
    """
    if (k is None) == (threshold is None):
        raise bad(
            "SeerAttention needs k or threshold, and not both",
            "Write SeerAttention(gate, k=16) or SeerAttention(gate, threshold=0.002).",
        )
    scorer = gate if isinstance(gate, Gate) else Gate(gate)
    if k is not None:
        return TopK(k, unit_kv=block, unit_q=block, scorer=scorer, share="none")
    assert threshold is not None
    return Threshold(
        threshold, of="softmax", unit_kv=block, unit_q=block, scorer=scorer, share="none"
    )


def DSA(q_index: Any, k_index: Any, weights: Any, k: int = 2048) -> TopK:
    """DeepSeek Sparse Attention: the tokens that the lightning indexer likes best.

    DeepSeek-AI 2025 (DeepSeek-V3.2), https://arxiv.org/abs/2512.02556. One list for all heads.

    Args:
        q_index, k_index, weights: see :class:`Indexer`.
        k: how many tokens.
    """
    return TopK(k, unit_kv=1, scorer=Indexer(q_index, k_index, weights), share="all")


def NSASelection(
    block: int = 64,
    k: int = 16,
    window: int = 32,
    stride: int = 16,
    sink: int = 1,
    local: int = 2,
    align: str = UPPER_LEFT,
) -> TopK:
    """The selected branch of Native Sparse Attention.

    Yuan et al. 2025, https://arxiv.org/abs/2502.11089. Heads that share a key head select together.
    Keys are compressed by their mean, where the paper learns how; :class:`Compressed` takes learned
    ones, and :func:`sparse_compile.native_sparse_attention` computes all three branches.

    Args:
        block: keys of a block.
        k: how many blocks, forced ones among them.
        window, stride: of the compressed keys, see :class:`OverlapPool`.
        sink, local: forced blocks at the start, and up to the query's own.
        align: see :class:`Scored`.

    >>> NSASelection()
    TopK(16, scorer=OverlapPool(), sink=1, local=2)
    """
    blocks, scorer = _parted("NSASelection", block), OverlapPool(window, stride)
    return TopK(k, scorer=scorer, sink=sink, local=local, align=align, **blocks)


def _parted(name: str, block: int) -> dict[str, Any]:
    """``unit_kv`` and ``block`` of blocks: the largest unit that divides them, as kernels read."""
    block = whole(f"{name}: block", block, 1)
    unit = next(unit for unit in reversed(UNITS) if block % unit == 0)
    return {"unit_kv": unit, "block": block if block != unit else None}


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

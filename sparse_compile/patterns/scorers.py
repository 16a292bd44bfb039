"""Scorers: how much a unit of queries wants a block of keys, as values.

A scorer is what :class:`TopK` and its like select by. It says what is computed; the computation is
in :mod:`sparse_compile.selection`. All scores are computed and compared in fp32, without gradient.
A function ``(q, k) -> scores`` can stand in the place of a scorer, see :class:`Gate`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from sparse_compile.patterns.base import Pattern
from sparse_compile.patterns.checks import Positive, bad, optional, real, store, whole, whole_from
from sparse_compile.patterns.data import HoldsData, is_tensor
from sparse_compile.patterns.parameters import Parameters


class Scorer(Parameters):
    """Base of the scorers of this library: values that print as what makes them.

    Attributes:
        tensors: its parameters that are tensors.
    """

    tensors: ClassVar[tuple[str, ...]] = ()

    def check_units(self, unit_q: int, block: int) -> None:
        """Raise if it cannot score blocks of ``block`` keys for ``unit_q`` queries."""

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """Raise if it does not fit a problem of this size."""


@dataclass(frozen=True, repr=False)
class MeanPool(Scorer):
    """The dot product of the query and the mean of the keys of a block, divided by sqrt(D).

    The router of MoBA (Lu et al. 2025, https://arxiv.org/abs/2502.13189). For a unit of several
    queries it is the mean over them, for heads that share a selection the sum over them. The mean
    is of all keys of the block, also of those that the mask hides from a query, such as the later
    ones of its own block: force that one with ``diagonal=True`` and its score does not matter.
    """


@dataclass(frozen=True, repr=False)
class MinMax(Scorer):
    """The most that the query times a key of the block can be, divided by sqrt(D).

    From Quest (Tang et al. 2024, https://arxiv.org/abs/2406.10774): with ``lo`` and ``hi`` the
    least and greatest keys of the block by channel, ``sum_d max(q_d * lo_d, q_d * hi_d)``. For a
    unit of several queries it is the mean over them, for heads that share a selection the sum.
    """


@dataclass(frozen=True, repr=False)
class OverlapPool(Scorer):
    """The attention that overlapping means of keys get, handed down to blocks, as a logarithm.

    The selection of Native Sparse Attention (Yuan et al. 2025, https://arxiv.org/abs/2502.11089,
    equations 8 to 10), with means in the place of its learned compression. Each query attends, by
    a softmax of scale 1/sqrt(D), to the means of the windows ``stride * i, ..., stride * i + window
    - 1``: those that the mask shows it entirely. Each window gives its weight to each of the
    ``window / stride`` cells of ``stride`` keys that it covers, a block sums those of its cells,
    and the heads that share a selection are summed, as are the queries of a unit. The score is the
    logarithm of that sum, at least that of the smallest normal fp32, so that :class:`TopP` sees
    its share.

    There are as many windows as cover all keys; only the last one may be shorter.

    On a GPU, and under a mask that reads no tensor and is the same for all heads, one kernel does
    all of this for queries of 16 bits. The means that it multiplies have 16 bits for bf16 and 22
    for fp16; all the rest is fp32.

    Args:
        window: keys per window; a multiple of ``stride``.
        stride: keys from the start of a window to that of the next; it divides the block.
    """

    window: int = 32
    stride: Positive = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        stride = self.stride
        window = whole("OverlapPool: window", self.window, stride)
        if window % stride:
            raise bad(
                f"OverlapPool: a window of {window} keys is not a multiple of the stride {stride}",
                f"Write window={window - window % stride}.",
            )
        store(self, window=window)

    def check_units(self, unit_q: int, block: int) -> None:
        """The stride must divide a block."""
        if block % self.stride:
            raise bad(
                f"{self!r} with blocks of {block} keys, which its stride does not divide",
                "Write a stride that divides the block, such as 16 of 64.",
            )


@dataclass(frozen=True, repr=False)
class Antidiagonal(Scorer):
    """The attention along every ``stride``-th antidiagonal, summed in blocks, as a logarithm.

    From XAttention (Xu et al. 2025, https://arxiv.org/abs/2503.16428). In each square of
    ``stride`` queries and keys the products on its antidiagonal are summed and divided by
    ``sqrt(D) * stride``; a softmax over the squares of a row, those that the mask may show, gives
    weights, which a block sums. Heads that share a selection are summed. The score is the
    logarithm of that sum, at least that of the smallest normal fp32, so that :class:`TopP` sees
    its share. Tokens beyond the end count as zeros.

    Args:
        stride: it divides ``unit_q`` and the block, so ``unit_q`` must be 16 or more.
    """

    stride: Annotated[int, whole_from(2)] = 16

    def check_units(self, unit_q: int, block: int) -> None:
        """The stride must divide both units."""
        if unit_q % self.stride or block % self.stride:
            raise bad(
                f"{self!r} with units of {unit_q} queries and blocks of {block} keys, which its "
                "stride does not divide",
                f"Write unit_q and block as multiples of {self.stride}, such as 128.",
            )


@dataclass(frozen=True, repr=False, eq=False)
class Indexer(HoldsData, Scorer):
    """The lightning indexer of DeepSeek Sparse Attention: ``sum_i w_i * relu(q_i . k)``.

    From DeepSeek-V3.2-Exp (DeepSeek-AI 2025, https://arxiv.org/abs/2512.02556). It makes one list
    for all heads. For a block of several keys the score is that of its best key, also if the mask
    hides that one; for a unit of several queries it is the mean over them.

    Args:
        q_index: [B, Hi, Nq, Di], floating; the queries of the indexer.
        k_index: [B, Nkv, Di], same dtype; its keys.
        weights: [B, Nq, Hi], floating; of its heads.
    """

    tensors = "q_index", "k_index", "weights"

    q_index: Any
    k_index: Any
    weights: Any

    def __post_init__(self) -> None:
        for name, dims, sizes in (
            ("q_index", 4, "[B, Hi, Nq, Di]"),
            ("k_index", 3, "[B, Nkv, Di]"),
            ("weights", 3, "[B, Nq, Hi]"),
        ):
            value = getattr(self, name)
            if not is_tensor(value) or not value.is_floating_point() or value.dim() != dims:
                got = f"{value.dtype} {list(value.shape)}" if is_tensor(value) else repr(value)
                raise bad(f"Indexer: {name} is {got}", f"Pass a floating tensor {sizes}.")

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """Batch and lengths must be those of q and k."""
        index_heads, dim = self.q_index.shape[1], self.q_index.shape[3]
        for name, wanted in (
            ("q_index", (batch, index_heads, n_q, dim)),
            ("k_index", (batch, n_kv, dim)),
            ("weights", (batch, n_q, index_heads)),
        ):
            got = tuple(getattr(self, name).shape)
            if got != wanted:
                raise bad(
                    f"Indexer: {name} {list(got)} for a batch of {batch}, {n_q} queries, {n_kv} "
                    f"keys and an indexer of {index_heads} heads of {dim}",
                    f"Pass {list(wanted)}.",
                )


@dataclass(frozen=True, repr=False)
class Gate(Scorer):
    """A learned module that scores blocks itself, as the gates of SeerAttention do.

    It is called once for all units, without gradient. Gates, and functions in the place of a
    scorer, are equal if they are the same object.

    Args:
        module: ``module(q, k)`` returns [B, Hs, Uq, Ukv], floating, for q [B, Hq, Nq, D] and k
            [B, Hkv, Nkv, D]; ``Uq`` and ``Ukv`` count units of queries and blocks of keys, and
            ``Hs`` divides the query heads, and divides the key heads or is a multiple of them.
            Heads that share a selection are summed; one head of the module may also serve more
            heads than ``share`` says.
    """

    module: Callable[[Any, Any], Any]

    def __post_init__(self) -> None:
        if isinstance(self.module, (Pattern, Scorer)) or not callable(self.module):
            raise bad(f"Gate({self.module!r}) cannot be called", "Pass a module of (q, k).")

    def __repr__(self) -> str:
        return f"Gate({name_of(self.module)})"


def name_of(function: Any) -> str:
    """How a function or module prints: its name, or that of its class."""
    return getattr(function, "__name__", None) or type(function).__name__


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

"""Scored, and TopK, TopRatio, TopP, Threshold: patterns that select blocks of keys by scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from sparse_compile.patterns import doors
from sparse_compile.patterns.base import Pattern
from sparse_compile.patterns.checks import (
    UPPER_LEFT,
    Align,
    Count,
    Flag,
    bad,
    one_of,
    optional,
    real,
    whole_from,
)
from sparse_compile.patterns.scorers import Gate, MeanPool, Scorer
from sparse_compile.patterns.selecting import Selecting

#: Tokens of a unit that kernels know.
UNITS = (1, 16, 32, 64, 128)
#: Blocks that a list whose length depends on the scores has room for, unless ``most`` says another
#: number.
ROOM = 1024


def _as_scorer(where: str, scorer: Any) -> Scorer:
    if scorer is None:
        # Not by default: torch.compile does not know where an object that is one comes from.
        return MeanPool()
    if isinstance(scorer, Scorer):
        return scorer
    if isinstance(scorer, (type, Pattern)) or not callable(scorer):
        raise bad(
            f"{where} is {scorer!r}",
            "Write a scorer, such as MeanPool(), or a function (q, k) -> scores.",
        )
    return Gate(scorer)


@dataclass(frozen=True, repr=False, kw_only=True)
class Scored(Selecting):
    """Base of :class:`TopK`, :class:`TopRatio`, :class:`TopP` and :class:`Threshold`.

    Each unit of queries selects among the blocks of keys that the mask does not hide from it
    entirely; which of them, by their scores, the subclass says. What all have in common:

    - Of blocks with equal scores the one of the lower number comes first. A score of +inf comes
      before all others; a block whose score is -inf or NaN is never selected by score.
    - *Forced* blocks (``sink``, ``local``, ``diagonal``) are selected whatever their score, unless
      the mask hides them. They come first, and count towards what the rule allows, as in NSA, MoBA
      and XAttention.
    - Scores are computed and compared in fp32, without gradient.

    NaN scores do not raise, since looking for them would wait for the device:
    :func:`sparse_compile.selection.checked_select` does look.

    Attributes:
        unit_kv: keys of a unit, which a kernel reads together: 1, 16, 32, 64 or 128.
        unit_q: consecutive queries that share a selection: 1, 16, 32, 64 or 128.
        block: keys that are scored, counted and selected together, a multiple of ``unit_kv``;
            None for one unit.
        scorer: how blocks are scored, or a function ``(q, k) -> scores``, see :class:`Gate`;
            :class:`MeanPool` unless given.
        sink: how many blocks at the start are forced.
        local: how many blocks that end with the query's own one are forced; for a unit of queries
            that stands in several blocks, as many that end with each of them.
        diagonal: whether the query's own block is forced; what ``local=1`` does.
        share: which query heads share a selection: "group", those that share a key head; "all";
            or "none". The scores of the heads that share are summed, as NSA does.
        most: blocks that a list has room for. A list that would be longer keeps its forced blocks
            and the best others. None: what the rule can need, but 1024 where that depends on the
            scores.
        align: the corner in which the diagonal starts, see :class:`Causal`; "lower_right" for the
            last queries of a longer sequence, as in decoding.
    """

    unit_kv: int = 64
    unit_q: int = 1
    block: Annotated[int | None, optional(whole_from(1))] = None
    scorer: Annotated[Scorer | Callable[[Any, Any], Any] | None, _as_scorer] = None
    sink: Count = 0
    local: Count = 0
    diagonal: Flag = False
    share: Annotated[str, one_of("group", "all", "none")] = "group"
    most: Annotated[int | None, optional(whole_from(1))] = None
    align: Align = UPPER_LEFT

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ("unit_kv", "unit_q"):
            unit = getattr(self, field)
            if unit not in UNITS or isinstance(unit, bool):
                raise bad(f"{name}: {field} is {unit!r}", f"Write one of {list(UNITS)}.")
        super().__post_init__()
        if self.block is not None and self.block % self.unit_kv:
            raise bad(
                f"{name}: a block of {self.block} keys is no multiple of unit_kv, {self.unit_kv}",
                "Write a unit_kv that divides it.",
            )
        assert isinstance(self.scorer, Scorer)
        self.scorer.check_units(self.unit_q, self.block_kv)
        self.check_room(f"{name}: most is {self.most}", self.most)

    def implied(self) -> dict[str, Any]:
        """Blocks are scored by their means unless it says otherwise."""
        return {"scorer": MeanPool()}

    def check_room(self, what: str, room: int | None) -> None:
        """Raise if ``room`` blocks are fewer than what is forced."""
        if room is not None and room < self.sink + self.reach:
            raise bad(
                f"{what}, but sink, local and diagonal force {self.sink + self.reach} blocks, "
                "which count",
                f"Write {self.sink + self.reach} or more, or force fewer.",
            )

    @property
    def block_kv(self) -> int:
        """Keys that are scored and selected together."""
        return self.unit_kv if self.block is None else self.block

    @property
    def reach(self) -> int:
        """How many blocks that end with a query's own one are forced."""
        return max(self.local, int(self.diagonal))

    @property
    def forced(self) -> int:
        """The most blocks that are forced for a unit of queries."""
        # Queries of one unit stand in several blocks if a block ends between them.
        ends = -(-(self.unit_q - 1) // self.block_kv) if self.reach else 0
        return self.sink + self.reach + ends

    def wanted(self, blocks: int) -> int:
        """The most blocks, of ``blocks``, that the rule can ask for.

        All, up to 1024, unless the subclass knows better.
        """
        return min(blocks, ROOM)

    def capacity(self, blocks: int) -> int:
        """Blocks that each list has room for, of the ``blocks`` that the keys make.

        >>> from sparse_compile import patterns as P
        >>> P.TopK(16).capacity(100), P.TopK(16).capacity(10), P.TopP(0.9).capacity(5000)
        (16, 10, 1024)
        """
        room = self.wanted(blocks) if self.most is None else self.most
        return min(blocks, max(room, self.forced))

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """The scorer must fit."""
        assert isinstance(self.scorer, Scorer)
        self.scorer.check(n_q, n_kv, batch, heads)

    def select(self, q: Any, k: Any, mask: Any, tables: Any, sizes: Any) -> Any:
        """See :meth:`Selecting.select`; ``mask`` may be None, to hide nothing."""
        return doors.selecting().select(self, q, k, mask, tables, sizes)


def by_head(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """The check of a parameter, or of a tuple of one for each list of heads."""

    def checked(where: str, value: Any) -> Any:
        if not isinstance(value, (tuple, list)):
            return check(where, value)
        if not value:
            raise bad(f"{where} is {value!r}", "Write one for each list of heads, or one for all.")
        return tuple(check(where, item) for item in value)

    return checked


def highest(value: Any) -> Any:
    """The greatest of a parameter that may be given by head."""
    return max(value) if isinstance(value, tuple) else value


def share_of(where: str, value: Any) -> float:
    """``value`` as a float above 0, and at most 1."""
    number = real(where, value)
    if not 0 < number <= 1:
        raise bad(f"{where} is {value!r}", "Write more than 0, and at most 1.")
    return number


@dataclass(frozen=True, repr=False)
class TopK(Scored):
    """The ``k`` blocks with the highest scores, forced ones among them; all if there are fewer.

    Args:
        k: how many; or a tuple with one for each list of heads: for each key head where
            ``share="group"``, for each query head where it is "none".
        unit_kv, unit_q, block, scorer, sink, local, diagonal, share, most, align: by keyword, see
            :class:`Scored`.

    >>> import torch
    >>> q, k = torch.ones(1, 1, 1, 2), torch.tensor([0.0, 3.0, 1.0, 2.0]).view(1, 1, 4, 1)
    >>> TopK(2, unit_kv=1).select(q, k.expand(1, 1, 4, 2), None, [], []).index.tolist()
    [[[[1, 3]]]]
    >>> TopK(16, sink=1, local=2)
    TopK(16, sink=1, local=2)
    """

    k: Annotated[int | tuple[int, ...], by_head(whole_from(1))]

    def __post_init__(self) -> None:
        super().__post_init__()
        for k in self.k if isinstance(self.k, tuple) else (self.k,):
            self.check_room(f"TopK: k is {k}", k)

    def wanted(self, blocks: int) -> int:
        """``k``."""
        most: int = highest(self.k)
        return most


@dataclass(frozen=True, repr=False)
class TopRatio(Scored):
    """The best of the blocks that a unit of queries may see: ``ratio`` of them, rounded up.

    Blocks that the mask hides do not count, so under a causal mask a late query selects more than
    an early one.

    Args:
        ratio: above 0, at most 1; or a tuple with one for each list of heads. It is taken as the
            decimal number that it prints as: 0.1 of 30 blocks is 3.
        unit_kv, unit_q, block, scorer, sink, local, diagonal, share, most, align: by keyword, see
            :class:`Scored`.
    """

    ratio: Annotated[float | tuple[float, ...], by_head(share_of)]

    def wanted(self, blocks: int) -> int:
        """``ratio`` of all blocks."""
        over, under = exact(highest(self.ratio))
        return -(-blocks * over // under)


@dataclass(frozen=True, repr=False)
class TopP(Scored):
    """The fewest blocks whose scores, after a softmax, sum to ``p`` or more.

    The softmax is over the blocks that the unit of queries may see. Forced blocks come first, and
    what they have counts, as in XAttention (Xu et al. 2025, https://arxiv.org/abs/2503.16428); the
    others follow from the highest on, until the sum is reached. Blocks with a score of +inf share
    the whole among them.

    Args:
        p: above 0, at most 1, which selects all whose score is above -inf; or a tuple with one for
            each list of heads.
        unit_kv, unit_q, block, scorer, sink, local, diagonal, share, most, align: by keyword, see
            :class:`Scored`.
    """

    p: Annotated[float | tuple[float, ...], by_head(share_of)]


@dataclass(frozen=True, repr=False)
class Threshold(Scored):
    """All blocks whose score is ``t`` or more; none, apart from forced ones, if none is.

    Args:
        t: the threshold; or a tuple with one for each list of heads.
        of: "scores" to compare them as they are, "softmax" to compare their softmax over the
            blocks that the unit of queries may see.
        unit_kv, unit_q, block, scorer, sink, local, diagonal, share, most, align: by keyword, see
            :class:`Scored`.
    """

    t: Annotated[float | tuple[float, ...], by_head(real)]
    of: Annotated[str, one_of("scores", "softmax")] = "scores"


def exact(ratio: float) -> tuple[int, int]:
    """The decimal number that ``ratio`` prints as, as a fraction of small integers.

    >>> exact(0.1)
    (1, 10)
    """
    return Fraction(repr(ratio)).limit_denominator(1 << 20).as_integer_ratio()

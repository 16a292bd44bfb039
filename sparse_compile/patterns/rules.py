"""TopK, TopRatio, TopP, Threshold: the blocks of keys with the best scores."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

from sparse_compile.patterns.checks import one_of, whole_from
from sparse_compile.patterns.scored import Scored, by_head, highest, real, share_of


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

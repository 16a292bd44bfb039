"""Packed: sequences of any length one behind the other, each with a mask of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import sympy

from sparse_compile.expr.nodes import KV, N_KV, N_Q, B, Q
from sparse_compile.patterns.base import And, Heads, Not, Or, Pattern, Tables
from sparse_compile.patterns.blocks import BigBird, Random
from sparse_compile.patterns.checks import bad, optional
from sparse_compile.patterns.data import (
    HoldsData,
    is_tensor,
    key_of,
    on_device,
    shape_of,
    values_now,
)
from sparse_compile.patterns.documents import Documents, Padding, checked_starts
from sparse_compile.patterns.selecting import Selecting


@dataclass(frozen=True, repr=False, eq=False)
class Packed(HoldsData, Pattern):
    """Sequences packed one behind the other: each attends to itself, with a mask of its own.

    The mask counts the tokens of each sequence from 0, and ends with it; what it says of a batch
    entry, such as a length of :class:`PrefixLM`, it says of a sequence. ``Documents(cu_seqlens=)``
    is the same where the mask is all. As the varlen functions of FlashAttention take it (Dao 2023,
    https://arxiv.org/abs/2307.08691).

    Args:
        cu_seqlens: where each sequence starts, and the end of the last; a tensor or tuple.
        mask: of each sequence.
        q_cu_seqlens: the same of the queries, if they are others than the keys; causal masks that
            have ``align="lower_right"`` are then aligned at the end of each sequence.

    >>> from sparse_compile import patterns as P
    >>> Packed((0, 3, 5), P.Causal()).dense(5, 5)[0, 0].int().tolist()
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    >>> Packed((0, 3, 5), P.PrefixLM((2, 1))).dense(5, 5)[0, 0].int().tolist()
    [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    """

    cu_seqlens: Annotated[Any, checked_starts]
    mask: Pattern
    q_cu_seqlens: Annotated[Any, optional(checked_starts)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.mask, Pattern):
            raise bad(
                f"Packed: {self.mask!r} is no pattern", "Write one, as in Packed(c, Causal())."
            )
        for part in _parts(self.mask):
            if isinstance(part, (Random, BigBird, Packed, Documents, Padding, Selecting)):
                raise bad(
                    f"Packed: {part!r} cannot be counted anew in each sequence",
                    f"Combine it, as in Packed(cu_seqlens, All()) & {part!r}.",
                )
        if self.q_cu_seqlens is not None and shape_of(self.q_cu_seqlens) != shape_of(
            self.cu_seqlens
        ):
            raise bad(
                f"Packed: {shape_of(self.cu_seqlens)[0] - 1} sequences of keys and "
                f"{shape_of(self.q_cu_seqlens)[0] - 1} of queries",
                "Write as many of both.",
            )

    @property
    def _of_queries(self) -> Any:
        return self.cu_seqlens if self.q_cu_seqlens is None else self.q_cu_seqlens

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """The sequences must cover the tokens, and the mask fit each of them."""
        starts = [values_now(given) for given in (self._of_queries, self.cu_seqlens)]
        for ends, tokens, name in zip(starts, (n_q, n_kv), ("queries", "keys"), strict=True):
            if ends is not None and ends[-1] != tokens:
                raise bad(
                    f"Packed: the sequences end at {ends[-1]}, but there are {tokens} {name}",
                    "The last entry is the number of tokens of all sequences; write q_cu_seqlens= "
                    "if the queries are others than the keys.",
                )
        if None in starts:
            return
        lengths = [[b - a for a, b in itertools.pairwise(ends)] for ends in starts]
        for queries, keys in dict.fromkeys(zip(*lengths, strict=True)):
            if queries and keys:
                self.mask.check(queries, keys, len(lengths[0]), heads)

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``start <= kv < end`` of the query's sequence, and its mask, counted from the start."""
        of_keys = _Bounds(self.cu_seqlens, self._of_queries)
        start, end = of_keys.at(tables, 0), of_keys.at(tables, 1)
        first, last = start, end
        if self.q_cu_seqlens is not None:
            of_queries = _Bounds(self.q_cu_seqlens, self.q_cu_seqlens)
            first, last = of_queries.at(tables, 0), of_queries.at(tables, 1)
        anew = {Q: Q - first, KV: KV - start, N_Q: last - first, N_KV: end - start}
        mask = self.mask.predicate(tables)
        if mask.has(B):
            anew[B] = of_keys.at(tables, None)
        mask = _without_equal_terms(mask.subs(anew, simultaneous=True))
        return sympy.And(sympy.Le(start, KV), sympy.Lt(KV, end), mask)


def _parts(pattern: Pattern) -> Iterator[Pattern]:
    """A pattern, and those that it is combined of."""
    yield pattern
    inner: tuple[Pattern, ...] = ()
    if isinstance(pattern, (And, Or)):
        inner = pattern.parts
    elif isinstance(pattern, Not):
        inner = (pattern.part,)
    elif isinstance(pattern, Heads):
        inner = pattern.patterns
    for part in inner:
        yield from _parts(part)


@dataclass(frozen=True)
class _Bounds:
    """Tables of what is known of a query's sequence.

    Attributes:
        starts: what is read of.
        of_queries: says which sequence each query belongs to.
    """

    starts: Any
    of_queries: Any

    def at(self, tables: Tables, later: int | None) -> Any:
        """The start (0) or end (1) of the query's sequence, or its number (None)."""
        key = "packed", key_of(self.starts), key_of(self.of_queries), later
        fixed = not (is_tensor(self.starts) or is_tensor(self.of_queries))
        return tables.add(key, "int32", self._maker(later), fixed)(Q)

    def _maker(self, later: int | None) -> Any:
        def make(device: Any, n_q: int, n_kv: int, batch: int, heads: int) -> Any:
            import torch

            own, ends = (
                on_device(starts, "int64")(device, n_q, n_kv, batch, heads)
                for starts in (self.starts, self.of_queries)
            )
            queries = torch.arange(n_q, device=device)
            sequence = torch.searchsorted(ends[1:].contiguous(), queries, right=True)
            found = sequence if later is None else own[(sequence + later).clamp(max=len(own) - 1)]
            return found.to(torch.int32)

        return make


def _without_equal_terms(predicate: sympy.Basic) -> sympy.Basic:
    """Comparisons without what stands on both sides, as ``kv - start <= q - start`` has."""
    return predicate.replace(
        lambda part: isinstance(part, sympy.core.relational.Relational), _moved
    )


def _moved(relation: sympy.Basic) -> sympy.Basic:
    left, right = relation.args
    both = {*sympy.Add.make_args(left)} & {*sympy.Add.make_args(right)}
    shared = sympy.Add(*both)
    return relation.func(left - shared, right - shared) if both else relation

"""What each batch entry holds: Documents, Padding, PrefixLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import sympy

from sparse_compile.expr.nodes import KV, N_KV, B, Q
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import UPPER_LEFT, Align, bad, one_of, optional, position, whole
from sparse_compile.patterns.data import (
    HoldsData,
    along,
    frozen,
    is_tensor,
    key_of,
    on_device,
    shape_of,
    values_now,
)


def _checked_ids(where: str, ids: Any) -> Any:
    return frozen(where, ids, (1, 2), "Write [tokens] or [batch, tokens].")


def checked_starts(where: str, starts: Any) -> Any:
    """Where sequences start, and the end of the last; ``where`` names it."""
    starts = frozen(where, starts, (1,), "Write the starts and the end: (0, 3, 8).", least=2)
    if not is_tensor(starts) and (starts[0] != 0 or list(starts) != sorted(starts)):
        raise bad(
            f"{where} is {starts}", "Start at 0 and write growing numbers, such as (0, 3, 8)."
        )
    return starts


_Ids = Annotated[Any, optional(_checked_ids)]
_Starts = Annotated[Any, optional(checked_starts)]


@dataclass(frozen=True, repr=False, eq=False)
class Documents(HoldsData, Pattern):
    """A token attends to the tokens of its own document.

    Args:
        ids: the document of each token, ``[tokens]`` or ``[batch, tokens]``; a tensor or tuples.
        cu_seqlens: instead of ids, where each document starts, and the end of the last:
            ``(0, 3, 8)`` is one of 3 tokens and one of 5.
        q_ids: the documents of the queries, when they are other tokens than the keys.

    >>> Documents((0, 0, 1)).dense(3, 3).int().tolist()
    [[[[1, 1, 0], [1, 1, 0], [0, 0, 1]]]]
    >>> Documents(cu_seqlens=(0, 2, 3)).dense(3, 3).int().tolist()
    [[[[1, 1, 0], [1, 1, 0], [0, 0, 1]]]]
    """

    ids: _Ids = None
    cu_seqlens: _Starts = None
    q_ids: _Ids = None

    def __post_init__(self) -> None:
        if (self.ids is None) == (self.cu_seqlens is None):
            raise bad(
                "Documents needs ids or cu_seqlens, and not both",
                "Write Documents(ids) or Documents(cu_seqlens=(0, 3, 8)).",
            )
        super().__post_init__()

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """Every token must have a document."""
        if self.q_ids is not None:
            _check_length("Documents: q_ids", self.q_ids, n_q, "queries", batch)
        elif n_q != n_kv:
            raise bad(
                f"Documents: {n_q} queries and {n_kv} keys cannot have the same documents",
                "Write q_ids= for the documents of the queries.",
            )
        if self.ids is not None:
            _check_length("Documents: ids", self.ids, n_kv, "keys", batch)
            return
        starts = values_now(self.cu_seqlens)
        if starts is not None and starts[-1] != n_kv:
            raise bad(
                f"Documents: cu_seqlens ends at {starts[-1]}, but there are {n_kv} keys",
                "The last entry is the number of tokens of all documents.",
            )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``ids[q] == ids[kv]``."""
        if self.ids is None:
            key = "starts", key_of(self.cu_seqlens)
            fixed = not is_tensor(self.cu_seqlens)
            of_key = tables.add(key, "int32", _ids_of(self.cu_seqlens), fixed)
        else:
            of_key = _reading(tables, self.ids)
        of_query = of_key if self.q_ids is None else _reading(tables, self.q_ids)
        return sympy.Eq(of_query(Q), of_key(KV))


def _reading(tables: Tables, ids: Any) -> Callable[[sympy.Expr], sympy.Expr]:
    lookup = tables.holding(ids)
    leading = [along(B, size) for size in shape_of(ids)[:-1]]
    return lambda token: lookup(*leading, token)


def _ids_of(starts: Any) -> Callable[..., Any]:
    """The document of each key, computed on the device that the starts are on."""

    def make(device: Any, n_q: int, n_kv: int, batch: int, heads: int) -> Any:
        import torch

        ends = on_device(starts, "int64")(device, n_q, n_kv, batch, heads)[1:]
        tokens = torch.arange(n_kv, device=device)
        return torch.searchsorted(ends, tokens, right=True).to(torch.int32)

    return make


def _check_length(where: str, ids: Any, tokens: int, name: str, batch: int) -> None:
    *leading, length = shape_of(ids)
    if length != tokens:
        raise bad(
            f"{where} names the documents of {length} tokens, but there are {tokens} {name}",
            f"Write {tokens} ids.",
        )
    if leading and leading[0] not in (1, batch):
        raise bad(
            f"{where} has {leading[0]} rows for a batch of {batch}", f"Write {batch} rows, or one."
        )


def _checked_lengths(where: str, lengths: Any) -> Any:
    instead = "Write one length for each batch entry, as in Padding(mask.sum(-1))."
    return frozen(where, lengths, (1,), instead)


@dataclass(frozen=True, repr=False, eq=False)
class Padding(HoldsData, Pattern):
    """Keys that are padding are not attended to.

    Args:
        lengths: how many keys of each batch entry are real; a tensor or tuple.
        side: where the padding is, ``"right"`` or ``"left"`` of them.

    >>> Padding((2, 3)).dense(1, 4, batch=2).int().tolist()
    [[[[1, 1, 0, 0]]], [[[1, 1, 1, 0]]]]
    >>> Padding((2, 3), side="left").dense(1, 4, batch=2).int().tolist()
    [[[[0, 0, 1, 1]]], [[[0, 1, 1, 1]]]]
    """

    lengths: Annotated[Any, _checked_lengths]
    side: Annotated[str, one_of("right", "left")] = "right"

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """There must be one length for each batch entry, between none and all keys."""
        (count,) = shape_of(self.lengths)
        if count != batch:
            raise bad(f"Padding: {count} lengths for a batch of {batch}", f"Write {batch} lengths.")
        for length in values_now(self.lengths) or ():
            if not 0 <= length <= n_kv:
                raise bad(
                    f"Padding: a length of {length}, but there are {n_kv} keys",
                    f"Write lengths from 0 to {n_kv}.",
                )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``kv < lengths[b]``, or ``kv >= n_kv - lengths[b]`` with the padding on the left."""
        length = tables.holding(self.lengths)(B)
        return sympy.Lt(KV, length) if self.side == "right" else sympy.Ge(KV, N_KV - length)


def _checked_prefix(where: str, prefix: Any) -> Any:
    if not hasattr(prefix, "__len__"):
        return whole(where, prefix, 0)
    return frozen(where, prefix, (1,), "Write an int, or one length for each batch entry.")


@dataclass(frozen=True, repr=False, eq=False)
class PrefixLM(HoldsData, Pattern):
    """All tokens attend to the prefix; the rest is causal.

    Raffel et al. 2020, https://arxiv.org/abs/1910.10683.

    Args:
        prefix: its length: an int, or one for each batch entry as a tensor or tuple.
        align: the corner in which the diagonal starts, see :class:`Causal`.

    >>> PrefixLM(2).dense(3, 3).int().tolist()
    [[[[1, 1, 0], [1, 1, 0], [1, 1, 1]]]]
    """

    prefix: Annotated[Any, _checked_prefix]
    align: Align = UPPER_LEFT

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """There must be one length for each batch entry."""
        shape = shape_of(self.prefix)
        if shape and shape != (batch,):
            raise bad(
                f"PrefixLM: {shape[0]} prefix lengths for a batch of {batch}",
                f"Write {batch} lengths, or an int for all.",
            )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``kv < prefix`` or ``kv <= q``."""
        prefix = self.prefix
        if not isinstance(prefix, int):
            prefix = tables.holding(prefix)(B)
        return sympy.Or(sympy.Lt(KV, prefix), sympy.Le(KV, position(self.align)))

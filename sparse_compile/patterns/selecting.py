"""Selecting and Selected: keys that are chosen by content, or given as indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import sympy

from sparse_compile.errors import PatternMisuse
from sparse_compile.patterns import doors
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import Positive, bad, blocks
from sparse_compile.patterns.data import HoldsData, dtype_of, frozen, is_tensor, on_device, shape_of


class Selecting(Pattern):
    """A pattern that selects units of keys for units of queries, from q and k or by index.

    It combines with others by ``&`` and ``|``. What it selects is known when q and k are, so it has
    no predicate over positions: :func:`sparse_compile.attention` splits a mask into what is static
    and what is selected. No gradient flows through the choice.

    Attributes:
        unit_q, unit_kv: consecutive queries, and keys, that are selected together.
    """

    unit_q: int
    unit_kv: int

    def predicate(self, tables: Tables) -> sympy.Basic:
        """There is none before q and k are known."""
        raise PatternMisuse(
            f"sparse_compile: {self!r} selects keys by content, so it has no mask before q and k "
            "are known. Pass it to sparse_compile.attention(q, k, v, mask=...), or attach it with "
            "sparse_compile.mask."
        )

    def select(self, q: Any, k: Any, mask: Any, tables: Any, sizes: Any) -> Any:
        """What it selects, as a :class:`sparse_compile.selection.Selection` of new tensors.

        It is called while graphs run, with autocast off, and must not wait for the device.

        Args:
            q: [B, Hq, Nq, D].
            k: [B, Hkv, Nkv, D].
            mask: the :class:`MaskExpr` of who may attend to whom, without what the static part of
                the whole mask allows anyway; a unit that it hides entirely is not selected.
            tables, sizes: what the mask reads.
        """
        raise NotImplementedError


def _checked_index(where: str, index: Any) -> Any:
    if isinstance(getattr(type(index), "pattern", None), property):
        name = type(index).__name__
        raise bad(f"{where} is a {name}", "Write its `pattern`, as in chosen.pattern.")
    if is_tensor(index) and dtype_of(index) == "bool":
        raise bad(f"{where} is a tensor of bools", "Write numbers of units of keys.")
    instead = "Write [batch, heads, units of queries, selected], heads 1 to share it among all."
    return frozen(where, index, (4,), instead)


@dataclass(frozen=True, repr=False, eq=False)
class Selected(HoldsData, Selecting):
    """The units of keys that ``index`` names, as a router or an indexer of the model made it.

    With units of one key this is the attention of DeepSeek Sparse Attention (DeepSeek-V3.2-Exp,
    2025), with blocks that of Native Sparse Attention (https://arxiv.org/abs/2502.11089). No
    gradient reaches the index.

    Args:
        index: integers [B, Hs, ceil(Nq / unit_q), K], a tensor or tuples. Hs divides the query
            heads, and divides the key heads or is a multiple of them. Negative numbers are left
            out, and repeated ones count once.
        unit_kv: consecutive keys that are selected together: 3 is the keys ``3 * unit_kv, ...``
        unit_q: consecutive queries that share a row of the index.
        count: int32 tensor, the index without its last axis: how many entries of each row count,
            which then must be int32, distinct, ascending and in range, and are taken as they are.
            Nothing is sorted, and nothing checks them: use the ``pattern`` of a
            :class:`sparse_compile.Selection`. None for any index.

    >>> import torch
    >>> Selected(torch.tensor([[[[0, 2], [1, -1]]]]), unit_kv=1)
    Selected(tensor([[[[0, 2], [1, -1]]]]), unit_kv=1)
    """

    index: Annotated[Any, _checked_index]
    unit_kv: Positive = 64
    unit_q: Positive = 1
    count: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count is not None:
            self._check_count()

    def _check_count(self) -> None:
        both = self.index, self.count
        fits = all([is_tensor(part) and str(part.dtype) == "torch.int32" for part in both])
        if not fits or tuple(self.count.shape) != tuple(self.index.shape[:3]):
            raise bad(
                "Selected: index and count are no int32 tensors [B, Hs, Uq, K] and [B, Hs, Uq]",
                "Write what selection.canonical(index, units) returns, or the index alone.",
            )

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """There must be a row for each unit of queries, of each batch entry and list of heads."""
        shape = shape_of(self.index)
        rows = blocks(n_q, self.unit_q)
        if shape[0] != batch or shape[2] != rows or shape[1] < 1 or heads % shape[1]:
            raise bad(
                f"Selected: an index of {list(shape)} for a batch of {batch}, {heads} query heads "
                f"and {n_q} queries in units of {self.unit_q}",
                f"Write [{batch}, heads, {rows}, selected], where heads divides {heads}.",
            )

    def select(self, q: Any, k: Any, mask: Any, tables: Any, sizes: Any) -> Any:
        """The index on the device of ``q``, ascending and without what is repeated or negative.

        With a count, the lists as they are.
        """
        selection = doors.selections()
        index = self.index
        if self.count is not None:
            lists = (part.detach().to(q.device, copy=True) for part in (index, self.count))
            return selection.Selection(*lists, self.unit_q, self.unit_kv)
        if is_tensor(index):
            index = index.detach().to(q.device)
        else:
            index = on_device(index, "int64")(q.device, 0, 0, 0, 0)
        index, count = selection.canonical(index, blocks(k.shape[2], self.unit_kv))
        return selection.Selection(index, count, self.unit_q, self.unit_kv)

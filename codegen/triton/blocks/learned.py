"""Gradients of learned tensors: what a kernel leaves for each lookup, and how that is added up.

A program must write where no other does, or the order of sums, and so their last bits, would be a
matter of chance. So for each lookup it leaves sums over what the lookup does not name, by tile of
queries, in a tensor of its own; what remains to be added up is small, but for tensors that have a
number for each pair.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import sympy
import torch
from torch import Tensor

from sparse_compile.codegen.added_up import added_up
from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.runtime.generated import fill
from sparse_compile.codegen.triton.text import learned as text
from sparse_compile.expr import KV, N_KV, N_Q, B, H, Q, indices_at, table_index
from sparse_compile.spec import AttentionSpec


class Sums(Enum):
    """Over what a program adds up, by the template that does it.

    Attributes:
        QUERIES: over the keys, for each query.
        KEYS: over the queries of a tile, for each key.
        DISTANCES: over the pairs of a tile of one distance ``kv - q``, by the places of a
            :class:`Band`, and then over those of the distances before and behind these.
        PAIRS: over nothing.
    """

    QUERIES = text.QUERIES
    KEYS = text.KEYS
    DISTANCES = text.DISTANCES
    PAIRS = text.PAIRS


@dataclass(frozen=True)
class Looked:
    """A lookup of a score program.

    Attributes:
        number: among the lookups of the program.
        lookup: it.
        sums: what a program leaves of it.
    """

    number: int
    lookup: sympy.Basic
    sums: Sums

    def lines(self, template: str) -> list[str]:
        """A template for it, in a kernel that may be told to leave it out."""
        body = fill(template, N=str(self.number)).splitlines()
        return [f"if WANT_{self.number}:", *(f"    {line}" for line in body)]

    def shape(self, call: AttentionCall, tiles: int) -> tuple[int, ...]:
        """Of what the programs leave: fp32 [B, Hq, ...]."""
        batch, heads, n_q, n_kv = call.shape
        rest = {
            Sums.QUERIES: (n_q,),
            Sums.KEYS: (tiles, n_kv),
            Sums.DISTANCES: (tiles, self.band(call).places + 2),
            Sums.PAIRS: (n_q, n_kv),
        }
        return batch, heads, *rest[self.sums]

    def band(self, call: AttentionCall) -> Band:
        """The places of distances, for a lookup of them."""
        sizes = tuple(call.learned[table_index(self.lookup)].shape)
        return _band(self.lookup, *call.shape[2:], sizes)


@dataclass(frozen=True)
class Band:
    """The places of distances ``kv - q``, one after the other.

    Attributes:
        places: how many there are.
        offset: the place of distance 0.
        dim: the dimension of the tensor whose indices the places are; None if they are those of
            all distances that there are.
        falling: whether it has the highest distance first.
    """

    places: int
    offset: int
    dim: int | None = None
    falling: bool = False


@functools.lru_cache(maxsize=256)
def _band(lookup: sympy.Basic, n_q: int, n_kv: int, sizes: tuple[int, ...]) -> Band:
    """Of a lookup in a tensor of these sizes."""
    dims = [d for d, arg in enumerate(lookup.args) if arg.free_symbols & {Q, KV}]
    for sign in (1, -1) if len(dims) == 1 else ():
        rest = sympy.expand(lookup.args[dims[0]] - sign * (KV - Q))
        known = rest.xreplace({N_Q: sympy.Integer(n_q), N_KV: sympy.Integer(n_kv)})
        if known.is_Integer:
            size, at = sizes[dims[0]], int(known)
            return Band(size, at if sign == 1 else size - 1 - at, dims[0], sign == -1)
    return Band(max(n_q + n_kv - 1, 0), n_q - 1)


@functools.lru_cache(maxsize=64)
def looked_up(spec: AttentionSpec) -> tuple[Looked, ...]:
    """The lookups of an attention."""
    program = spec.score
    if program is None:
        return ()
    plain = all(view.q.is_natural and view.kv.is_natural for view in spec.parts)
    lookups = enumerate(program.lookups)
    return tuple(Looked(n, lookup, _sums(lookup, plain)) for n, lookup in lookups)


def _sums(lookup: sympy.Basic, plain: bool) -> Sums:
    named = lookup.free_symbols
    if KV not in named:
        return Sums.QUERIES
    if Q not in named:
        return Sums.KEYS
    # Coordinates as the first query and a distance: where the query is gone, that is all it names.
    shifted = [sympy.expand(arg.xreplace({KV: KV + Q})) for arg in lookup.args]
    return Sums.DISTANCES if plain and not any(s.has(Q) for s in shifted) else Sums.PAIRS


def lines_of(looked: Sequence[Looked]) -> dict[str, list[str]]:
    """Lines before the loop, in it and after it, by the names of holes."""
    start, step, end = [], [], []
    for one in looked:
        around = {
            Sums.QUERIES: (text.QUERIES_BEFORE, text.QUERIES_AFTER),
            Sums.DISTANCES: (text.DISTANCES_BEFORE, text.DISTANCES_AFTER),
        }
        if one.sums in around:
            before, after = around[one.sums]
            start += one.lines(before)
            end += one.lines(after)
        step += one.lines(one.sums.value)
    return {"START": start, "LEARNED": step, "EARLIER": end}


def total(call: AttentionCall, one: Looked, left: Tensor) -> Tensor:
    """The gradient of what a lookup reads, fp32, from what the programs left.

    Args:
        call: the attention.
        one: the lookup.
        left: as :meth:`Looked.shape` says.
    """
    if one.sums in (Sums.KEYS, Sums.DISTANCES):
        left = left.sum(2)
    if one.sums is Sums.DISTANCES:
        left = _with_ends(left, one.band(call))
    shape = call.learned[table_index(one.lookup)].shape
    plain = _plain(call, one, left, shape)
    return _scattered(call, one, left, shape) if plain is None else plain


def _with_ends(left: Tensor, band: Band) -> Tensor:
    """[..., places + 2] as [..., places], in the order of the tensor: ends get what is beyond."""
    found = left[..., : band.places]
    if band.places:
        found[..., 0] += left[..., -2]
        found[..., -1] += left[..., -1]
    return found.flip(-1) if band.falling else found


def _plain(call: AttentionCall, one: Looked, left: Tensor, shape: torch.Size) -> Tensor | None:
    """The sums over what a lookup does not name, where it names coordinates as they are."""
    axes: tuple[sympy.Symbol, ...] = _AXES.get(one.sums, ())
    args = list(one.lookup.args)
    if one.sums is Sums.DISTANCES and (dim := one.band(call).dim) is not None:
        args[dim], axes = KV, (B, H, KV)
    named = [arg for arg in args if arg != 0]
    if len(set(named)) < len(named) or not set(named) <= set(axes):
        return None
    gone = [dim for dim, axis in enumerate(axes) if axis not in named]
    kept = [axis for axis in axes if axis in named]
    left = left.sum(gone) if gone else left
    left = left.permute([kept.index(axis) for axis in named])
    return left.reshape(shape).contiguous() if left.numel() == shape.numel() else None


#: The axes of what is left for a lookup.
_AXES = {Sums.QUERIES: (B, H, Q), Sums.KEYS: (B, H, KV), Sums.PAIRS: (B, H, Q, KV)}


def _scattered(call: AttentionCall, one: Looked, left: Tensor, shape: torch.Size) -> Tensor:
    """The sums by the indices of a lookup."""
    if B not in one.lookup.free_symbols and left.shape[0] > 1:
        left = left.sum(0, keepdim=True)
    rank, device = left.dim(), left.device
    places = [_leading(n, axis, rank, device) for axis, n in enumerate(left.shape)]
    where = {"b": places[0], "h": places[1], "q": places[2], "kv": places[-1]}
    if one.sums is Sums.DISTANCES:
        where |= {"q": torch.zeros_like(places[2]), "kv": places[2] - one.band(call).offset}
    indices = indices_at(one.lookup, call.score_data(where))
    if one.sums is Sums.DISTANCES and (dim := one.band(call).dim) is not None:
        indices[dim] = places[2]
    within = [at.clamp(0, n - 1) for at, n in zip(indices, shape, strict=True)]
    return added_up(left, within, shape)


def _leading(n: int, axis: int, rank: int, device: torch.device) -> Tensor:
    """0 to n - 1 along an axis of tensors of some rank."""
    return torch.arange(n, device=device).view([-1 if d == axis else 1 for d in range(rank)])

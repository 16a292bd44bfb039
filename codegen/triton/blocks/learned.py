"""Gradients of learned tensors: what a kernel leaves for each lookup, and how that is added up.

A program must write where no other does, or the order of sums, and so their last bits, would be a
matter of chance. So for each lookup it leaves sums over what the lookup does not name, by tile of
queries, in a tensor of its own; what remains to be added up is small, but for tensors that have a
number for each pair.
"""

from __future__ import annotations

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
from sparse_compile.expr import KV, B, H, Q, indices_at, table_index
from sparse_compile.spec import AttentionSpec


class Sums(Enum):
    """Over what a program adds up, by the template that does it.

    Attributes:
        QUERIES: over the keys, for each query.
        KEYS: over the queries of a tile, for each key.
        DISTANCES: over the pairs of a tile of one distance ``kv - q``.
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

    def shape(self, call: AttentionCall, tiles: int, extent: int) -> tuple[int, ...]:
        """Of what the programs leave: fp32 [B, Hq, ...]."""
        batch, heads, n_q, n_kv = call.shape
        rest = {
            Sums.QUERIES: (n_q,),
            Sums.KEYS: (tiles, n_kv),
            Sums.DISTANCES: (tiles, n_kv + 2 * extent),
            Sums.PAIRS: (n_q, n_kv),
        }
        return batch, heads, *rest[self.sums]


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
        if one.sums is Sums.QUERIES:
            start += one.lines(text.QUERIES_BEFORE)
            end += one.lines(text.QUERIES_AFTER)
        step += one.lines(one.sums.value)
    return {"START": start, "LEARNED": step, "EARLIER": end}


def total(call: AttentionCall, one: Looked, left: Tensor, extent: int) -> Tensor:
    """The gradient of what a lookup reads, fp32, from what the programs left.

    Args:
        call: the attention.
        one: the lookup.
        left: as :meth:`Looked.shape` says.
        extent: queries of a tile.
    """
    lowest = 0
    if one.sums is Sums.DISTANCES:
        lowest = -left.shape[2] * extent
        left = _by_distance(left, extent)
    elif one.sums is Sums.KEYS:
        left = left.sum(2)
    shape = call.learned[table_index(one.lookup)].shape
    plain = _plain(one, left, shape)
    return _scattered(call, one, left, shape, lowest) if plain is None else plain


def _by_distance(left: Tensor, extent: int) -> Tensor:
    """[B, H, tiles, n_kv + 2 * extent] as sums over tiles for each distance, lowest first.

    Entry i of tile t is of the distance i - (t + 1) * extent.
    """
    tiles, width = left.shape[2:]
    lead = left.shape[:2]
    padded = torch.nn.functional.pad(left.flip(2), (0, -width % extent))
    blocks = padded.reshape(*lead, tiles, -1, extent)
    count = blocks.shape[3] + tiles
    # Tile t is moved t tiles to the right: a view of rows that are one shorter.
    moved = torch.nn.functional.pad(blocks, (0, 0, 0, tiles)).flatten(2, 3)
    moved = moved[:, :, : tiles * (count - 1)].reshape(*lead, tiles, count - 1, extent)
    return moved.sum(2).flatten(2)


def _plain(one: Looked, left: Tensor, shape: torch.Size) -> Tensor | None:
    """The sums over what a lookup does not name, where it names coordinates as they are."""
    names = {Sums.QUERIES: (B, H, Q), Sums.KEYS: (B, H, KV), Sums.PAIRS: (B, H, Q, KV)}
    axes, named = names.get(one.sums, ()), [arg for arg in one.lookup.args if arg != 0]
    if len(set(named)) < len(named) or not set(named) <= set(axes):
        return None
    gone = [dim for dim, axis in enumerate(axes) if axis not in named]
    kept = [axis for axis in axes if axis in named]
    left = left.sum(gone) if gone else left
    left = left.permute([kept.index(axis) for axis in named])
    return left.reshape(shape).contiguous() if left.numel() == shape.numel() else None


def _scattered(
    call: AttentionCall, one: Looked, left: Tensor, shape: torch.Size, lowest: int
) -> Tensor:
    """The sums by the indices of a lookup; ``lowest`` is the first distance."""
    if B not in one.lookup.free_symbols and left.shape[0] > 1:
        left = left.sum(0, keepdim=True)
    rank, device = left.dim(), left.device
    places = [_leading(n, axis, rank, device) for axis, n in enumerate(left.shape)]
    where = {"b": places[0], "h": places[1], "q": places[2], "kv": places[-1]}
    if one.sums is Sums.DISTANCES:
        where |= {"q": torch.zeros_like(places[2]), "kv": places[2] + lowest}
    data = call.score_data(where)
    indices = [
        at.clamp(0, n - 1) for at, n in zip(indices_at(one.lookup, data), shape, strict=True)
    ]
    return added_up(left, indices, shape)


def _leading(n: int, axis: int, rank: int, device: torch.device) -> Tensor:
    """0 to n - 1 along an axis of tensors of some rank."""
    return torch.arange(n, device=device).view([-1 if d == axis else 1 for d in range(rank)])

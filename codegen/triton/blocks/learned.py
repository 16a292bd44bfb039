"""Gradients of learned tensors: what a kernel leaves for each lookup.

A program must write where no other does, or the order of sums, and so their last bits, would be a
matter of chance. So for each lookup it leaves sums over what the lookup does not name, by tile of
queries, in a tensor of its own; what remains to be added up is small, but for tensors that have a
number for each pair (:mod:`sparse_compile.codegen.triton.blocks.gradients`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import sympy

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.runtime.generated import fill
from sparse_compile.codegen.triton.score import apart_of, of_distance
from sparse_compile.codegen.triton.text import learned as text
from sparse_compile.expr import KV, N_KV, N_Q, Q, table_index
from sparse_compile.spec import AttentionSpec


class Sums(Enum):
    """Over what a program adds up, by the template that does it.

    Attributes:
        QUERIES: over the keys, for each query.
        KEYS: over the queries of a tile, for each key.
        APART: the same, by the places of a :class:`Band`, and then over those of the keys before
            and behind these.
        DISTANCES: over the pairs of a tile of one distance ``kv - q``, by places likewise.
        PAIRS: over nothing.
    """

    QUERIES = text.QUERIES
    KEYS = text.KEYS
    APART = text.APART
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

    @property
    def is_placed(self) -> bool:
        """Whether sums are by the places of a band."""
        return self.sums in (Sums.APART, Sums.DISTANCES)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Of a kernel that leaves such sums, how many places there are, and which is the first."""
        names = {Sums.APART: ("places",), Sums.DISTANCES: ("places", "offset")}
        return tuple(f"{name}_{self.number}" for name in names.get(self.sums, ()))

    def placed(self, call: AttentionCall) -> dict[str, int]:
        """Values of these."""
        band = self.band(call) if self.is_placed else None
        values = (band.places, band.offset) if band else ()
        return dict(zip(self.parameters, values, strict=False))

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
            Sums.PAIRS: (n_q, n_kv),
        }
        placed = (tiles, self.band(call).places + 2) if self.is_placed else ()
        return batch, heads, *rest.get(self.sums, placed)

    def band(self, call: AttentionCall) -> Band:
        """The places of sums that have some."""
        sizes = tuple(call.learned[table_index(self.lookup)].shape)
        apart = apart_of(self.lookup)
        if apart is not None:
            return Band(sizes[apart.dim], 0, apart.dim)
        return _band(self.lookup, *call.shape[2:], sizes)


@dataclass(frozen=True)
class Band:
    """The places of numbers for distances ``kv - q``, or for keys, one after the other.

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
    plain = all(view.is_natural for view in spec.parts)
    lookups = enumerate(program.lookups)
    return tuple(Looked(n, lookup, _sums(lookup, plain)) for n, lookup in lookups)


def _sums(lookup: sympy.Basic, plain: bool) -> Sums:
    named = lookup.free_symbols
    if KV not in named:
        return Sums.QUERIES
    if Q not in named:
        return Sums.APART if apart_of(lookup) else Sums.KEYS
    return Sums.DISTANCES if plain and of_distance(lookup) else Sums.PAIRS


def lines_of(looked: Sequence[Looked]) -> dict[str, list[str]]:
    """Lines before the loop, in it and after it, by the names of holes."""
    start, step, end = [], [], []
    for one in looked:
        around = {
            Sums.QUERIES: (text.QUERIES_BEFORE, text.QUERIES_AFTER),
            Sums.APART: (text.APART_BEFORE, text.PLACES_AFTER),
            Sums.DISTANCES: (text.DISTANCES_BEFORE, text.PLACES_AFTER),
        }
        if one.sums in around:
            before, after = around[one.sums]
            start += one.lines(before)
            end += one.lines(after)
        step += one.lines(one.sums.value)
    return {"START": start, "LEARNED": step, "STORE": end}

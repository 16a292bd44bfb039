"""Dense evaluation: the value of a predicate at given coordinates, as torch tensors.

This is the definition that layouts, printed kernels and lifted masks are tested against.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from torch import Tensor

from sparse_compile.expr.dropout import BITS, SPREAD, Dropout
from sparse_compile.expr.fold import fold, fold_real, joined
from sparse_compile.expr.mask_expr import MaskExpr
from sparse_compile.expr.nodes import table_index
from sparse_compile.expr.score import ScoreProgram

_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "+": operator.add,
    "*": operator.mul,
    "//": functools.partial(torch.div, rounding_mode="floor"),
    "%": torch.remainder,
    "bit": lambda word, index: word >> index & 1,
    "abs": torch.abs,
    "min": torch.minimum,
    "max": torch.maximum,
    "where": torch.where,
    "<": torch.lt,
    "<=": torch.le,
    ">": torch.gt,
    ">=": torch.ge,
    "==": torch.eq,
    "!=": torch.ne,
    "and": operator.and_,
    "or": operator.or_,
    "not": operator.invert,
}


class _Dense:
    """The algebra whose values are integer and Boolean tensors that broadcast."""

    def __init__(
        self,
        symbols: Mapping[str, Tensor],
        numbers: Mapping[str, int],
        tables: Sequence[Tensor],
        learned: Sequence[Tensor] = (),
    ) -> None:
        self.symbols, self.numbers = symbols, numbers
        self.tables, self._learned = tables, learned
        self.device = next(iter(symbols.values())).device

    def integer(self, value: int) -> Tensor:
        return self._number(value, torch.int64)

    def real(self, value: sympy.Number) -> Tensor:
        # Without axes, it takes the precision of what it meets.
        return self._number(float(value), torch.float64)

    def boolean(self, value: bool) -> Tensor:
        return self._number(value, torch.bool)

    def symbol(self, name: str) -> Tensor:
        found = self.symbols.get(name)
        return self.integer(self.numbers[name]) if found is None else found

    def _number(self, value: float, dtype: torch.dtype) -> Tensor:
        # Not torch.tensor, which would copy from the host, and wait.
        return torch.full((), value, dtype=dtype, device=self.device)

    def table(self, index: int, args: Sequence[Tensor], exprs: Sequence[sympy.Expr]) -> Tensor:
        found = looked_up(self.tables[index], args)
        return found if found.is_floating_point() else found.to(torch.int64)

    def learned(self, index: int, args: Sequence[Tensor], exprs: Sequence[sympy.Expr]) -> Tensor:
        found = looked_up(self._learned[index], args)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def operation(self, name: str, args: Sequence[Tensor], expr: sympy.Basic) -> Tensor:
        if name in _OPERATIONS:
            return joined(_OPERATIONS[name], name, args)
        function = getattr(torch, name)  # of a real number
        (a,) = args
        result: Tensor = function(a if a.is_floating_point() else a.double())
        return result


def looked_up(values: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """The elements of a tensor at indices, one for each of its dimensions, that broadcast."""
    # Coordinates past the end occur in ragged blocks; whoever asked drops those entries.
    inside = [at.clamp(0, size - 1) for at, size in zip(indices, values.shape, strict=True)]
    return values[tuple(inside)] if inside else values


def evaluate(
    mask: MaskExpr,
    coordinates: Mapping[str, Tensor],
    n_q: int,
    n_kv: int,
    tables: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
) -> Tensor:
    """The predicate at ``coordinates``.

    Args:
        mask: the predicate.
        coordinates: int64 tensors ``b, h, q, kv`` that broadcast together, all on one device.
        n_q: number of queries.
        n_kv: number of keys.
        tables: the tensors ``t0, t1, ...``.
        sizes: the integers ``s0, s1, ...``.

    Returns:
        bool tensor of the broadcast shape of the coordinates the predicate mentions (a predicate
        that ignores ``h`` gives size 1 there).

    >>> q, kv = torch.arange(3)[:, None], torch.arange(3)[None]
    >>> from sparse_compile.expr import KV, Q
    >>> evaluate(MaskExpr(KV <= Q), {"q": q, "kv": kv}, 3, 3).int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    numbers = _numbers(n_q, n_kv, sizes)
    return fold(mask.predicate, _Dense(coordinates, numbers, tables))


def grid(device: torch.device, **axes: range) -> dict[str, Tensor]:
    """Coordinates int64 that broadcast to all combinations, the last axis innermost.

    >>> at = grid(torch.device("cpu"), q=range(2), kv=range(4, 7))
    >>> at["q"].tolist(), at["kv"].tolist()
    ([[0], [1]], [4, 5, 6])
    """
    inner = range(len(axes) - 1, -1, -1)
    return {
        name: torch.arange(at.start, at.stop, device=device).view(-1, *[1] * dims)
        for (name, at), dims in zip(axes.items(), inner, strict=True)
    }


@dataclass(frozen=True)
class ScoreData:
    """What a score program reads besides the score; by default nothing.

    Attributes:
        coordinates: int64 tensors ``b, h, q, kv`` that broadcast to the shape of the scores.
        n_q, n_kv, tables, sizes: as for :func:`evaluate`.
        learned: the tensors ``w0, w1, ...``.
    """

    coordinates: Mapping[str, Tensor] = field(default_factory=dict)
    n_q: int = 0
    n_kv: int = 0
    tables: Sequence[Tensor] = ()
    sizes: Sequence[int] = ()
    learned: Sequence[Tensor] = ()


_NOTHING = ScoreData()


def evaluate_score(program: ScoreProgram, score: Tensor, data: ScoreData = _NOTHING) -> Tensor:
    """A score program at scores; differentiable.

    Args:
        program: the program.
        score: floating, scaled products of queries and keys.
        data: what else the program mentions.

    Returns:
        in the shape and dtype of ``score``.

    >>> from sparse_compile.expr.score import softcap
    >>> evaluate_score(softcap(2.0), torch.tensor([0.0, 100.0])).tolist()
    [0.0, 2.0]
    """
    (value,) = _score_values(score, data, program.value)
    return value * 0 if program.absorbed else value


def evaluate_slope(
    program: ScoreProgram, score: Tensor, data: ScoreData = _NOTHING
) -> tuple[Tensor, Tensor]:
    """:func:`evaluate_score`, and the derivative of each score."""
    value, slope = _score_values(score, data, program.value, program.derivative)
    return value * 0 if program.absorbed else value, slope


def add_learned_gradients(
    program: ScoreProgram,
    score: Tensor,
    grad: Tensor,
    data: ScoreData,
    to: Sequence[Tensor | None],
) -> None:
    """Add to the gradients of the tensors ``w0, w1, ...`` what they get from some scores.

    Args:
        program: the program.
        score: floating, scaled products of queries and keys.
        grad: of what the program made of them; 0 where that is hidden.
        data: as for :func:`evaluate_score`.
        to: floating, contiguous, in the shapes of these tensors; None for those without gradients.
    """
    for lookup in program.lookups:
        total = to[table_index(lookup)]
        if total is None:
            continue
        # The factor, then the indices: these may be numbers, and broadcast.
        wanted = program.derivative_by(lookup), *lookup.args
        factor, *indices = _values_at(data, {"score": score}, *wanted)
        place = torch.zeros([1] * score.dim(), dtype=torch.int64, device=score.device)
        for at, size in zip(indices, total.shape, strict=True):
            place = place * size + at.clamp(0, size - 1)
        share = (grad * factor).expand(score.shape).to(total.dtype)
        # Sums over whole axes first: these are fast, and lose less.
        share, place = share.sum_to_size(place.shape).reshape(-1), place.reshape(-1)
        if total.device.type == "cpu":
            total.view(-1).index_add_(0, place, share)
        else:  # index_add would add in any order
            total.view(-1).index_put_((place,), share, accumulate=True)


def _score_values(score: Tensor, data: ScoreData, *exprs: sympy.Expr) -> list[Tensor]:
    values = _values_at(data, {"score": score}, *exprs)
    return [value.to(score.dtype).expand(score.shape) for value in values]


def evaluate_lookup(lookup: sympy.Expr, like: Tensor, data: ScoreData) -> Tensor:
    """A real expression that reads no score, at coordinates; in the shape and dtype of ``like``."""
    (value,) = _values_at(data, {}, lookup)
    return value.to(like.dtype).expand(like.shape)


def keeps(dropout: Dropout, seed: Tensor, data: ScoreData) -> Tensor:
    """Which pairs keep their weight, bool, in the broadcast shape of the coordinates.

    Args:
        dropout: the probability, and which coordinates matter.
        seed: int64 [2], each below 2 ** 31.
        data: ``b``, ``h``, ``q`` and ``kv``, and what else these are computed from.

    >>> at = grid(torch.device("cpu"), b=range(1), h=range(1), q=range(100), kv=range(100))
    >>> kept = keeps(Dropout(0.25), torch.tensor([1, 2]), ScoreData(at))
    >>> kept.shape, round(float(kept.float().mean()), 1)
    (torch.Size([1, 1, 100, 100]), 0.8)
    """
    q, kv = _values_at(data, {}, dropout.q, dropout.kv)
    where = {"b": data.coordinates["b"], "h": data.coordinates["h"], "q": q, "kv": kv}
    hashed = _mixed(seed[0] ^ _mixed(seed[1]))
    for name, spread in SPREAD.items():
        hashed = _mixed(hashed ^ (where[name] * spread & _WORD))
    return (hashed >> 32 - BITS) < dropout.threshold


_WORD = (1 << 32) - 1


def _mixed(x: Tensor) -> Tensor:
    """``lowbias32`` of 32 bits that are held in int64."""
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15) * 0x846CA68B & _WORD
    return x ^ x >> 16


def indices_at(indices: Sequence[sympy.Expr], data: ScoreData) -> list[Tensor]:
    """Indices of a lookup of a score program, which may lie outside of its tensor."""
    return _values_at(data, {}, *indices)


def _values_at(data: ScoreData, scores: Mapping[str, Tensor], *exprs: sympy.Expr) -> list[Tensor]:
    tensors = {**scores, **data.coordinates}
    numbers = _numbers(data.n_q, data.n_kv, data.sizes)
    return fold_real(_Dense(tensors, numbers, data.tables, data.learned), *exprs)


def _numbers(n_q: int, n_kv: int, sizes: Sequence[int]) -> dict[str, int]:
    """The lengths and sizes by their names."""
    return {"n_q": n_q, "n_kv": n_kv, **{f"s{i}": size for i, size in enumerate(sizes)}}

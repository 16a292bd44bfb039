"""Dense evaluation: the value of a predicate at given coordinates, as torch tensors.

This is the definition that layouts, printed kernels and lifted masks are tested against.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence

import sympy
import torch
from torch import Tensor

from sparse_compile.expr.fold import fold
from sparse_compile.expr.mask_expr import MaskExpr

_COMPARE = {
    "<": torch.lt,
    "<=": torch.le,
    ">": torch.gt,
    ">=": torch.ge,
    "==": torch.eq,
    "!=": torch.ne,
}


class _Dense:
    """The algebra whose values are integer and Boolean tensors that broadcast."""

    def __init__(self, symbols: Mapping[str, Tensor], tables: Sequence[Tensor]) -> None:
        self.symbols, self.tables = symbols, tables
        self.device = symbols["q"].device

    def integer(self, value: int) -> Tensor:
        return torch.tensor(value, dtype=torch.int64, device=self.device)

    def boolean(self, value: bool) -> Tensor:
        return torch.tensor(value, device=self.device)

    def symbol(self, name: str) -> Tensor:
        return self.symbols[name]

    def table(self, index: int, args: Sequence[Tensor], exprs: Sequence[sympy.Expr]) -> Tensor:
        values = self.tables[index]
        # Coordinates past the end occur in ragged blocks; whoever asked drops those entries.
        inside = [arg.clamp(0, size - 1) for arg, size in zip(args, values.shape, strict=True)]
        return (values[tuple(inside)] if inside else values).to(torch.int64)

    def add(self, args: Sequence[Tensor]) -> Tensor:
        return functools.reduce(operator.add, args)

    def mul(self, args: Sequence[Tensor]) -> Tensor:
        return functools.reduce(operator.mul, args)

    def floordiv(self, a: Tensor, b: Tensor, expr: sympy.Expr) -> Tensor:
        return torch.div(a, b, rounding_mode="floor")

    def mod(self, a: Tensor, b: Tensor, expr: sympy.Expr) -> Tensor:
        return torch.remainder(a, b)

    def bit(self, word: Tensor, index: Tensor) -> Tensor:
        return word >> index & 1

    def absolute(self, a: Tensor) -> Tensor:
        return a.abs()

    def minimum(self, args: Sequence[Tensor]) -> Tensor:
        return functools.reduce(torch.minimum, args)

    def maximum(self, args: Sequence[Tensor]) -> Tensor:
        return functools.reduce(torch.maximum, args)

    def select(self, condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
        return torch.where(condition, yes, no)

    def compare(self, op: str, a: Tensor, b: Tensor) -> Tensor:
        return _COMPARE[op](a, b)

    def conjunction(self, args: Sequence[Tensor]) -> Tensor:
        return functools.reduce(operator.and_, args)

    def disjunction(self, args: Sequence[Tensor]) -> Tensor:
        return functools.reduce(operator.or_, args)

    def negation(self, a: Tensor) -> Tensor:
        return ~a


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
    device = coordinates["q"].device
    scalars = {"n_q": n_q, "n_kv": n_kv, **{f"s{i}": size for i, size in enumerate(sizes)}}
    symbols = dict(coordinates)
    for name, value in scalars.items():
        symbols[name] = torch.tensor(value, dtype=torch.int64, device=device)
    return fold(mask.predicate, _Dense(symbols, tables))

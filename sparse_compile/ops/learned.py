"""Checks of the tensors that a score program reads, before a kernel reads beyond one of them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import sympy
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.errors import BadShape
from sparse_compile.expr import KV, N_KV, N_Q, B, H, Q, ScoreProgram, table_index

_COORDINATES = (B, H, Q, KV)


class _Index(NamedTuple):
    """An index that is linear in coordinates and lengths.

    Attributes:
        tensor, dim: of which tensor, and along which of its dimensions.
        text: the lookup that it stands in.
        constant: what is added.
        steps: what ``b, h, q, kv`` are multiplied with.
        lengths: what ``n_q`` and ``n_kv`` are multiplied with.
    """

    tensor: int
    dim: int
    text: str
    constant: int
    steps: tuple[int, ...]
    lengths: tuple[int, int]


def check_learned(call: AttentionCall) -> None:
    """Raise if a score program would read beyond a tensor ``w0, w1, ...`` of its call.

    Indices are checked that are linear in coordinates and lengths: all that the library writes.
    Where there is a mask, those of pairs are not: a window has no bias beyond. Kernels take the
    nearest value there, so that nothing beyond is read from memory, either.

    Raises:
        BadShape: there are too few tensors or too many; one has other dimensions than its lookups,
            or ends before an index does.
    """
    program = call.spec.score
    wanted = 0 if program is None else len(program.learned)
    wanted += call.spec.dropout is not None  # its seed comes last
    if len(call.learned) != wanted:
        raise BadShape(
            f"sparse_compile: attention got {len(call.learned)} learned tensors, and its spec "
            f"reads {wanted}. Pass one for each dtype of its score program, and a seed for dropout."
        )
    if program is None or 0 in call.shape:
        return
    for lookup in program.lookups:
        tensor = call.learned[table_index(lookup)]
        if tensor.dim() != len(lookup.args):
            raise BadShape(
                f"sparse_compile: the score program reads {lookup}, but w{table_index(lookup)} has "
                f"shape {list(tensor.shape)}. Give it {len(lookup.args)} dimensions."
            )
    masked = call.spec.mask.predicate != sympy.true
    for index in _indices(program):
        if masked and index.steps[2] and index.steps[3]:
            continue  # of pairs: those beyond may be those that the mask hides
        _check_index(index, call.learned[index.tensor], call)


def _check_index(index: _Index, tensor: Tensor, call: AttentionCall) -> None:
    n_q, n_kv = call.shape.n_q, call.shape.n_kv
    start = index.constant + index.lengths[0] * n_q + index.lengths[1] * n_kv
    sizes = call.shape.batch, call.shape.heads, n_q, n_kv
    reach = [step * (size - 1) for step, size in zip(index.steps, sizes, strict=True)]
    low, high = start + sum(min(r, 0) for r in reach), start + sum(max(r, 0) for r in reach)
    size = tensor.shape[index.dim]
    if low < 0 or high >= size:
        raise BadShape(
            f"sparse_compile: the score program reads {index.text} at indices {low} to {high} of "
            f"dimension {index.dim}, but w{index.tensor} has shape {list(tensor.shape)}. "
            f"Make that dimension {high + 1}."
            if low >= 0
            else f"sparse_compile: the score program reads {index.text} at index {low} of "
            f"dimension {index.dim}. Indices start at 0."
        )


@functools.lru_cache(maxsize=256)
def _indices(program: ScoreProgram) -> tuple[_Index, ...]:
    symbols = (*_COORDINATES, N_Q, N_KV)
    found = []
    for lookup in program.lookups:
        for dim, arg in enumerate(lookup.args):
            steps = [arg.coeff(symbol) for symbol in symbols]
            rest = sympy.expand(arg - sum(a * s for a, s in zip(steps, symbols, strict=True)))
            if not all(number.is_Integer for number in (rest, *steps)):
                continue
            numbers = tuple(map(int, steps))
            place = table_index(lookup), dim, str(lookup)
            found.append(_Index(*place, int(rest), numbers[:4], (numbers[4], numbers[5])))
    return tuple(found)

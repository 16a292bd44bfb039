"""The plainest program that still shows what a program showed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

from benchmarks.fuzz.program import Program, Sizes


def shrunk(program: Program, shows: Callable[[Program], bool]) -> Program:
    """Without any choice that it does not need.

    Args:
        program: which shows something.
        shows: whether another one shows the same.

    >>> from benchmarks.fuzz.program import Joined, Piece
    >>> masks = tuple(Joined(Piece(name)) for name in ("tril", "window", "padding"))
    >>> least = shrunk(Program(grad=True, masks=masks), lambda p: len(p.masks) > 1)
    >>> [mask.piece.name for mask in least.masks], least.grad
    (['window', 'padding'], False)
    """
    for simpler in _simpler(program):
        if shows(simpler):
            return shrunk(simpler, shows)
    return program


def _simpler(program: Program) -> Iterator[Program]:
    """Programs with a choice less."""
    plain = Program()
    for field in fields(program):
        value, default = getattr(program, field.name), getattr(plain, field.name)
        if isinstance(value, tuple):
            for n in range(len(value)):
                yield replace(program, **{field.name: value[:n] + value[n + 1 :]})
        elif value != default and not isinstance(value, Sizes):
            yield replace(program, **{field.name: default})
    for sizes in _smaller(program.sizes):
        yield replace(program, sizes=sizes)


def _smaller(sizes: Sizes) -> Iterator[Sizes]:
    plain = Sizes()
    if sizes.rank != plain.rank:
        yield replace(sizes, rank=plain.rank)
    for name in ("G", "H", "B"):
        if getattr(sizes, name) > 1:
            yield replace(sizes, **{name: 1})
    for name in ("D", "E"):
        if getattr(sizes, name) != 4:
            yield replace(sizes, **{name: 4})
    if sizes.NQ != sizes.NK:
        yield replace(sizes, NQ=sizes.NK)
    for length in (sizes.NK // 2, sizes.NK - 1):
        if length >= 4:
            yield replace(sizes, NQ=min(sizes.NQ, length), NK=length)

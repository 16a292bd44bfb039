"""Global and Longformer: a few tokens that see, and are seen by, all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import sympy

from sparse_compile.expr.nodes import KV
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import (
    UPPER_LEFT,
    Align,
    Flag,
    bad,
    position,
    runs,
    store,
    whole,
    whole_from,
)
from sparse_compile.patterns.local import within

#: More runs of consecutive tokens than this are looked up in a table.
_RUNS_SPELLED = 8


@dataclass(frozen=True, repr=False)
class Global(Pattern):
    """Global tokens: all tokens attend to them, and they attend to all tokens.

    From Longformer (Beltagy et al. 2020, https://arxiv.org/abs/2004.05150) and ETC. On its own it
    is the global part only; add the local part with ``|``.

    Args:
        tokens: how many tokens from the start are global, or which ones.
        rows: whether the global tokens attend to all tokens. Without, they are only seen by all,
            as the attention sinks of StreamingLLM (https://arxiv.org/abs/2309.17453) are.
        align: with fewer queries than keys, which of the tokens the queries are,
            see :class:`Causal`.

    >>> Global(1).dense(3, 3).int().tolist()
    [[[[1, 1, 1], [1, 0, 0], [1, 0, 0]]]]
    >>> Global((2,), rows=False).dense(2, 3).int().tolist()
    [[[[0, 0, 1], [0, 0, 1]]]]
    """

    tokens: int | tuple[int, ...]
    rows: Flag = True
    align: Align = UPPER_LEFT

    def __post_init__(self) -> None:
        super().__post_init__()
        store(self, tokens=checked_tokens("Global", self.tokens))

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """Global tokens must exist."""
        last = self.tokens - 1 if isinstance(self.tokens, int) else self.tokens[-1]
        if last >= n_kv:
            raise bad(
                f"Global: token {last} is global, but there are {n_kv} keys",
                f"Name tokens below {n_kv}.",
            )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``q`` is global or ``kv`` is global."""
        is_global = self._membership(tables)
        if not self.rows:
            return is_global(KV)
        return sympy.Or(is_global(position(self.align)), is_global(KV))

    def _membership(self, tables: Tables) -> Callable[[sympy.Expr], sympy.Basic]:
        tokens = self.tokens
        if isinstance(tokens, int):
            return lambda place: _between(place, 0, tokens - 1)
        found = runs(tokens)
        if len(found) <= _RUNS_SPELLED:
            return lambda place: sympy.Or(*(_between(place, *run) for run in found))
        lookup = tables.add(("global", tokens), "bool", self._table)
        return lambda place: sympy.And(place >= 0, sympy.Ne(lookup(place), 0))

    def _table(self, device: Any, n_q: int, n_kv: int, batch: int, heads: int) -> Any:
        import torch

        table = torch.zeros(max(n_q, n_kv), dtype=torch.bool, device=device)
        table[torch.tensor(self.tokens, device=device)] = True
        return table


def checked_tokens(where: str, tokens: Any) -> int | tuple[int, ...]:
    """A number of tokens, or some tokens sorted; ``where`` names the pattern."""
    tokens = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    if not isinstance(tokens, (Sequence, range, set, frozenset)) or isinstance(tokens, str):
        return whole(f"{where}: the number of global tokens", tokens, 1)
    indices = sorted({whole(f"{where}: a global token", token, 0) for token in tokens})
    if not indices:
        raise bad(f"{where} of no tokens", "Name one token or more.")
    return tuple(indices)


def _between(place: sympy.Expr, first: int, last: int) -> sympy.Basic:
    if first == last:
        return sympy.Eq(place, first)
    return sympy.And(sympy.Ge(place, first), sympy.Le(place, last))


@dataclass(frozen=True, repr=False)
class Longformer(Pattern):
    """The pattern of Longformer: near keys, and a few tokens that see and are seen by all.

    Beltagy et al. 2020, https://arxiv.org/abs/2004.05150.

    Args:
        window: the whole width, as in the paper: half of it to either side of the query.
        global_: how many tokens from the start are global, or which ones.
        align: the corner in which the diagonal starts, see :class:`Causal`.

    >>> Longformer(2).dense(5, 5)[0, 0].int().tolist()
    [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 1, 1, 1], [1, 0, 0, 1, 1]]
    """

    window: Annotated[int, whole_from(2)]
    global_: int | tuple[int, ...] = 1
    align: Align = UPPER_LEFT

    def __post_init__(self) -> None:
        super().__post_init__()
        store(self, global_=checked_tokens("Longformer", self.global_))

    @property
    def global_part(self) -> Global:
        """The global tokens alone."""
        return Global(self.global_, align=self.align)

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """Global tokens must exist."""
        self.global_part.check(n_q, n_kv, batch, heads)

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``abs(q - kv) <= window // 2``, or one of them is global."""
        half = self.window // 2
        near = within(position(self.align), half, half)
        return sympy.Or(near, self.global_part.predicate(tables))

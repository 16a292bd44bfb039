"""A predicate as an Or of terms that may want different orders, and as disjoint ones.

Only what mentions a remainder of ``q`` or ``kv`` can be denser in another order than the plain one;
everything else is kept together as one term, so there are few.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import sympy
import torch

from sparse_compile.expr import KV, Bit, FloorDiv, FloorMod, H, MaskExpr, Q, evaluate, is_table

#: A predicate with more terms than this keeps the last of them together.
MOST_TERMS = 8
#: No attention has more heads.
_MOST_HEADS = 1 << 16


def terms(predicate: sympy.Basic) -> tuple[sympy.Basic, ...]:
    """Predicates whose Or is ``predicate``; the one without remainders first.

    >>> near, far = Q - KV < 4, sympy.Eq(FloorMod(Q - KV, 4), 0)
    >>> terms((KV <= Q) & (near | far))
    ((kv <= q) & (-kv + q < 4), (kv <= q) & Eq(FloorMod(-kv + q, 4), 0))
    >>> terms((KV <= Q) & ((KV < 4) | near))
    ((kv <= q) & ((kv < 4) | (-kv + q < 4)),)
    """
    found = _disjuncts(predicate)
    if len(found) == 1:
        return (predicate,)
    # In the order of their text, since sympy keeps the arguments of an Or in a set.
    periodic = sorted((term for term in found if periods(term)), key=str)
    plain = [term for term in found if not periods(term)]
    periodic, surplus = periodic[: MOST_TERMS - 1], periodic[MOST_TERMS - 1 :]
    plain += surplus
    return (*((sympy.Or(*plain),) if plain else ()), *periodic)


def _disjuncts(predicate: sympy.Basic) -> list[sympy.Basic]:
    if not periods(predicate):
        return [predicate]
    if isinstance(predicate, sympy.Not) and isinstance(predicate.args[0], (sympy.And, sympy.Or)):
        inner = predicate.args[0]
        dual = sympy.Or if isinstance(inner, sympy.And) else sympy.And
        return _disjuncts(dual(*(sympy.Not(arg) for arg in inner.args)))
    if isinstance(predicate, sympy.Or):
        return [term for arg in predicate.args for term in _disjuncts(arg)]
    if isinstance(predicate, sympy.And):
        return _distributed(predicate)
    return [predicate]


def _distributed(conjunction: sympy.And) -> list[sympy.Basic]:
    factors = [_joined(_disjuncts(arg)) for arg in conjunction.args]
    if math.prod(map(len, factors)) > 4 * MOST_TERMS:
        return [conjunction]
    products = (sympy.And(*choice) for choice in itertools.product(*factors))
    return [product for product in products if product != sympy.false]


def _joined(disjuncts: list[sympy.Basic]) -> list[sympy.Basic]:
    """The same with all plain ones as one."""
    plain = [term for term in disjuncts if not periods(term)]
    return [*([sympy.Or(*plain)] if plain else []), *(term for term in disjuncts if periods(term))]


def periods(expr: sympy.Basic) -> frozenset[int]:
    """After how many tokens the remainders in ``expr`` repeat.

    >>> sorted(periods(sympy.Eq(FloorMod(FloorDiv(Q, 64), 16), FloorMod(KV, 64))))
    [64, 1024]
    """
    found = set()
    # Where a word ends says nothing about the mask.
    of_words = {node for bit in expr.atoms(Bit) for node in bit.atoms(FloorMod)}
    for node in expr.atoms(FloorMod) - of_words:
        x, modulus = node.args
        if modulus.is_Integer and modulus > 1 and x.free_symbols & {Q, KV}:
            unit = _unit(x)
            # Cells of 64 tokens that repeat after 16: the grid also has rows of 64.
            found |= {unit * int(modulus), unit}
    return frozenset(found - {1})


def _unit(x: sympy.Basic) -> int:
    """How many tokens one step of ``x`` is."""
    scale = 1
    if isinstance(x, FloorDiv) and x.args[1].is_Integer and x.args[1] > 0:
        scale = int(x.args[1])
    inner = (_unit(arg) for arg in x.args if arg.free_symbols & {Q, KV})
    return scale * max(inner, default=1)


def without(term: sympy.Basic, earlier: Sequence[sympy.Basic]) -> sympy.Basic:
    """``term`` and none of ``earlier``; what follows from the term is not spelled.

    >>> causal = KV <= Q
    >>> without(causal & (KV >= 8), [causal & (Q - KV < 4)])
    (kv >= 8) & (kv <= q) & (-kv + q >= 4)
    >>> without(causal & (H < 2), [causal & (H >= 2)])
    (kv <= q) & (h < 2)
    """
    mine = sympy.And.make_args(term)
    excluded = []
    for other in (part for whole in earlier for part in sympy.Or.make_args(whole)):
        rest = [literal for literal in sympy.And.make_args(other) if literal not in mine]
        if any(sympy.Not(literal) in mine for literal in rest):
            continue
        if not _share_a_head((*mine, *rest)):
            continue
        excluded.append(sympy.Or(*(sympy.Not(literal) for literal in rest)))
    return sympy.And(term, *excluded)


def _share_a_head(literals: Sequence[sympy.Basic]) -> bool:
    """Whether the conditions on ``h`` alone allow some head."""
    about = [
        literal
        for literal in literals
        if literal.free_symbols == {H} and not any(map(is_table, literal.atoms(sympy.Function)))
    ]
    if not about:
        return True
    where = {"h": torch.arange(_MOST_HEADS), "q": torch.zeros(1, dtype=torch.int64)}
    return bool(evaluate(MaskExpr(sympy.And(*about)), where, 1, 1).any())


def window_of(term: sympy.Basic, side: sympy.Symbol, period: int) -> tuple[int, int]:
    """``(lo, hi)``: where ``term`` holds, ``lo <= side % period < hi``.

    >>> window_of((KV <= Q) & (FloorMod(KV, 8) >= 6), KV, 8)
    (6, 8)
    """
    about = [literal for literal in sympy.And.make_args(term) if _repeats(literal, side, period)]
    if not about:
        return 0, period
    where = {name: torch.arange(period) for name in ("q", "kv")}
    holds = evaluate(MaskExpr(sympy.And(*about)), where, 1, 1).expand(period).nonzero()
    if not holds.numel():
        return 0, period
    return int(holds.min()), int(holds.max()) + 1


def _repeats(literal: sympy.Basic, side: sympy.Symbol, period: int) -> bool:
    """Whether the truth of ``literal`` follows from ``side % period``."""
    if literal.free_symbols != {side}:
        return False

    def repeats(node: sympy.Basic) -> bool:
        if isinstance(node, FloorMod):
            x, modulus = node.args
            if modulus.is_Integer and modulus > 0:
                return (period % int(modulus) == 0 and _is_polynomial(x)) or repeats(x)
        if node == side or is_table(node):
            return False
        return all(map(repeats, node.args))

    return repeats(literal)


def _is_polynomial(x: sympy.Basic) -> bool:
    """Whether ``x`` modulo any number follows from its symbols modulo that number."""
    if x.is_Symbol or x.is_Integer:
        return True
    return isinstance(x, (sympy.Add, sympy.Mul)) and all(map(_is_polynomial, x.args))

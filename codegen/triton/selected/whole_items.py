"""Items of work all pairs of which the mask allows: there it need not be evaluated.

An item is a unit of keys and entries that name it, in the order of their queries, so its first and
last entry bound the queries. What must hold between bounds follows from interval analysis.
"""

from __future__ import annotations

from sparse_compile.codegen.triton.layout.key import Key, constant_sizes
from sparse_compile.codegen.triton.layout.source import verdict_text
from sparse_compile.codegen.triton.layout.text import BOUNDS
from sparse_compile.expr import B, H, MaskExpr
from sparse_compile.spec.view import natural

_LINES = """\
earliest = tl.load(PLACES + lo // ROWS) // most * UNIT_Q
latest = tl.load(PLACES + hi // ROWS - 1) // most * UNIT_Q + (UNIT_Q - 1)
latest, end = tl.minimum(latest, n_q - 1), first + TILE_N
must, may = verdict(
    earliest, latest, first, tl.minimum(end, n_kv) - 1, 0, 0, 0, 0, n_q, n_kv$SIZES
)
partly = tl.where(must, end > n_kv, True)
"""


def can_print(mask: MaskExpr) -> bool:
    """Whether a kernel can bound a mask: it reads no table, and is the same for all heads."""
    varies = mask.tables or mask.depends_on(B) or mask.depends_on(H)
    return not varies and not constant_sizes(mask.text)


def _key(mask: MaskExpr) -> Key:
    return Key(mask.text, natural(1), natural(1), (None,) * mask.n_sizes)


def functions(mask: MaskExpr) -> list[str]:
    """The functions that :func:`lines` needs besides those that predicates are printed with."""
    verdict = verdict_text(_key(mask)).strip() + "\n"
    return [BOUNDS, verdict] if "LEAST" in verdict or "GREATEST" in verdict else [verdict]


def lines(mask: MaskExpr) -> list[str]:
    """Lines that say whether an item holds pairs that the mask hides."""
    sizes = ", ".join(["", *_key(mask).sizes])
    return _LINES.replace("$SIZES", sizes).splitlines()

"""Masks that a kernel can evaluate by itself, in runs of queries and keys."""

from __future__ import annotations

import sympy

from sparse_compile.codegen.triton.layout.key import Key
from sparse_compile.expr import B, H, MaskExpr
from sparse_compile.selection.visible import Visible
from sparse_compile.spec.view import natural


def printable(visible: Visible) -> bool:
    """Whether kernels can tell from its text what a mask may show: it reads no tensor."""
    mask = visible.mask
    if mask is None or visible.n_q < 1 or visible.n_kv < 1:
        return True
    return not (mask.tables or mask.depends_on(B) or mask.depends_on(H))


def key_of(visible: Visible, run_q: int, run_kv: int) -> Key:
    """What the text of a printable mask is made for, in runs of so many queries and keys."""
    mask = visible.mask or MaskExpr(sympy.true)
    return Key.of(mask, visible.sizes, natural(run_q), natural(run_kv))


def free_sizes(visible: Visible, key: Key) -> dict[str, int]:
    """The sizes that are parameters of kernels."""
    return {f"s{i}": visible.sizes[i] for i, fixed in enumerate(key.fixed) if fixed is None}

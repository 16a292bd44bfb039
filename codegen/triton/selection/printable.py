"""What kernels need of a mask that they evaluate by themselves, in runs of queries and keys."""

from __future__ import annotations

import sympy

from sparse_compile.codegen.triton.layout.key import Key
from sparse_compile.expr import MaskExpr
from sparse_compile.selection.visible import Visible
from sparse_compile.spec.view import natural


def key_of(visible: Visible, run_q: int, run_kv: int) -> Key:
    """What the text of a printable mask is made for, in runs of so many queries and keys."""
    mask = visible.mask or MaskExpr(sympy.true)
    return Key.of(mask, visible.sizes, natural(run_q), natural(run_kv))

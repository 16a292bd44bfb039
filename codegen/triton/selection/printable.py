"""What kernels need of a mask that they evaluate by themselves, in runs of queries and keys."""

from __future__ import annotations

from sparse_compile.codegen.triton.layout.key import Key
from sparse_compile.selection.visible import Visible
from sparse_compile.spec.view import natural


def key_of(visible: Visible, run_q: int, run_kv: int) -> Key:
    """What the text of a printable mask is made for, in runs of so many queries and keys."""
    return Key.of(visible.mask, visible.sizes, natural(run_q), natural(run_kv))


def free_sizes(visible: Visible, key: Key) -> dict[str, int]:
    """The sizes that are parameters of kernels."""
    return {f"s{i}": visible.sizes[i] for i, fixed in enumerate(key.fixed) if fixed is None}

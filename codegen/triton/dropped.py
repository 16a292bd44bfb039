"""Dropout in the kernels: lines that drop weights, or the gradients of those that were dropped."""

from __future__ import annotations

from sparse_compile.expr import Dropout


def dropped(dropout: Dropout | None, name: str) -> list[str]:
    """Lines that keep of a tile ``name`` what stays; ``stay`` says which pairs do.

    >>> dropped(None, "weight")
    []
    """
    if dropout is None:
        return []
    stay = f"stay = stays(w{dropout.seed}, b, h, q, kv, {dropout.threshold})"
    return [stay, f"{name} = tl.where(stay, {name} * {dropout.factor!r}, 0.0)"]

"""What a view is, in words."""

from __future__ import annotations

from sparse_compile.spec.view import Order, View


def view_text(view: View) -> str:
    """The orders of a view, for people.

    >>> from sparse_compile.expr import KV, Q
    >>> from sparse_compile.spec.view import natural
    >>> view_text(View(KV <= Q, natural(64), Order((8, 8), (128,), (0, 1), ((120, 128),))))
    'keys 120..127 of every 128'
    >>> view_text(View(KV <= Q, *[Order((8, 8), (256,), (0, 1))] * 2))
    'tiles of 8 x 8 on a grid of width 256'
    """
    q, kv = _words(view.q), _words(view.kv)
    if q == kv:
        return _both(q) if q else "plain"
    return " and ".join(side for side in (_side("queries", q), _side("keys", kv)) if side)


def _both(words: str) -> str:
    if words.startswith("tiles "):
        return words
    return f"q and kv {words}"


def _side(name: str, words: str) -> str:
    if not words:
        return ""
    return f"{name} in {words}" if words.startswith("tiles ") else f"{name} {words}"


def _words(order: Order) -> str:
    """How one side is put into blocks; empty for the plain order."""
    if order.is_natural:
        return ""
    box = " x ".join(map(str, order.box))
    if len(order.radices) > 1:
        return f"tiles of {box} on a grid of planes of {' x '.join(map(str, order.radices))}"
    (radix,), ((lo, hi),) = order.radices, order.windows
    if not order.is_complete:
        return f"{lo}..{hi - 1} of every {radix}"
    if order.box[1] == 1:
        return f"by residue mod {radix}"
    return f"tiles of {box} on a grid of width {radix}"

"""select: what a mask selects, once for all that use it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.api.data import Tables, canonical_of, data_of, tables_of
from sparse_compile.api.plan import name_of
from sparse_compile.errors import PatternMisuse
from sparse_compile.ops.operands import WIDEST_UNITS, check_operands
from sparse_compile.ops.selection import SELECT
from sparse_compile.patterns.base import Pattern
from sparse_compile.patterns.learned import NSA
from sparse_compile.selection import Selection
from sparse_compile.selection.split import without_selection
from sparse_compile.sites.named import INDEX, LISTS, NamedMask

#: Text of the mask of selected keys, key of that mask, its tables, what selects, and the units.
SelectedPart = tuple[str, str, Tables, str, tuple[int, int]]


def select(mask: Pattern, q: Tensor, k: Tensor) -> Selection:
    """What a mask selects, to be used in several calls of :func:`attention`, or by several layers.

    Scores are computed once, and the lists of indices made once, for all that share the result:

        chosen = sparse_compile.select(P.Causal() & P.TopK(16), q, k)
        out = sparse_compile.attention(q, k, v, P.Causal() & chosen.pattern)

    It can be called anywhere :func:`attention` can, waits for no device, and its result may be
    passed to and from compiled code. No gradient flows through it.

    Args:
        mask: a pattern that selects, with what else the mask has: what that hides is not selected,
            nor is what it attends to anyway.
        q: [B, Hq, Nq, D], float32, float16 or bfloat16.
        k: [B, Hkv, Nkv, D], same dtype; Hkv divides Hq.

    Raises:
        BadShape, UnsupportedDtype, BadPattern: as :func:`attention` does.
        PatternMisuse: the mask selects nothing.

    >>> from sparse_compile import patterns
    >>> q = torch.randn(1, 2, 100, 16)
    >>> chosen = select(patterns.Causal() & patterns.TopK(3, unit_kv=16), q, q)
    >>> chosen.index.shape, chosen.unit_kv
    (torch.Size([1, 2, 100, 3]), 16)
    """
    if isinstance(mask, NSA):
        raise PatternMisuse(
            f"sparse_compile: select() got {mask!r}, which is no mask. Call nsa_selection(q, k, "
            "pattern), or pass Causal() & pattern.selection."
        )
    if not isinstance(mask, Pattern):
        raise PatternMisuse(_nothing(f"a mask of type {type(mask).__name__}"))
    if not torch.compiler.is_compiling():
        check_operands(q, k, k, (WIDEST_UNITS[0], WIDEST_UNITS[0]))
        mask.check(q.shape[2], k.shape[2], q.shape[0], q.shape[1])
    given: list[Tensor] = []
    selected = selected_of(name_of(mask, given))
    if selected is None:
        raise PatternMisuse(_nothing(f"{mask!r}"))
    owner = None if torch.compiler.is_compiling() else mask
    index, count, _ = lists_of(q, k, selected, given, owner)
    return Selection(index, count, *selected[4])


def _nothing(what: str) -> str:
    return (
        f"sparse_compile: select() got {what}, which selects nothing. Pass a pattern that does, as "
        "in Causal() & TopK(16)."
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def selected_of(text: str) -> SelectedPart | None:
    """What a named mask selects, as plain values; None if nothing."""
    named = NamedMask.parse(text)
    if named.selected is None:
        return None
    mask = named.selected.mask
    return mask.text, named.selected.key, tables_of(mask), named.selects, named.units


def lists_of(
    q: Tensor,
    k: Tensor,
    selected: SelectedPart,
    given: Sequence[Tensor],
    owner: Pattern | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Index and count of what a mask selects, and the tables of the mask of selected keys.

    Args:
        q, k: as for :func:`sparse_compile.attention`.
        selected: what selects.
        given: the tensors that it was given, in the order of their numbers.
        owner: the pattern, to keep the tables while it does not change; None to make them.
    """
    mask_text, key, mask_tables, leaf, units = selected
    tables: list[Tensor] = []
    if mask_tables:
        rest = None if owner is None else without_selection(owner)
        lengths = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        tables = data_of(rest, (key, mask_tables, lengths, k.shape[1], (), "", q.device))[0]
    if leaf == LISTS:
        index, count = (part.detach().to(q.device) for part in given)
    elif leaf == INDEX:
        index, count = canonical_of(given[0], -(-k.shape[2] // units[1]), q.device)
    else:
        content, held = (q.detach(), k.detach()), [tensor.detach() for tensor in given]
        index, count = SELECT(*content, held, tables, [], mask_text, leaf)
    return index, count, tables

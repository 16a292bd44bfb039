"""Operators that read annotations while a rewritten graph runs: tables, and checks of promises.

What travels in the graph is the key of a mask. The tensors that a pattern holds are read in each
call, so their values may change without a new compilation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile.errors import BadPattern, BrokenPromise, SparseCompileError
from sparse_compile.expr import MaskExpr, evaluate
from sparse_compile.ops.fresh_size import fresh_size
from sparse_compile.ops.registered import operator
from sparse_compile.patterns.base import BoundMask
from sparse_compile.sites.annotation import bound_mask_named

#: A recorded CUDA graph would replay the values of the first call.
_TAGS = (torch.Tag.cudagraph_unsafe,)
#: An added mask value hides a key from here downwards; anything between this and 0 is a bias.
_HIDES = -1e4
_ORDER = ("b", "h", "q", "kv")


def _mask_named(key: str) -> BoundMask:
    bound = bound_mask_named(key)
    if bound is None:
        raise SparseCompileError(
            "sparse_compile: a compiled graph outlived the pattern it reads. Keep what was "
            "annotated, or the pattern that was passed, for as long as the compiled function."
        )
    return bound


@operator("pattern_table", tags=_TAGS)
def pattern_table(
    key: str,
    index: int,
    rank: int,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    n_q: int,
    n_kv: int,
    device: torch.device,
) -> Tensor:
    """A table of a pattern, with the values that its data has now.

    Args:
        key: of the mask, see :func:`sparse_compile.sites.annotation.bound_mask_named`.
        index: which of its tables.
        rank: number of dimensions that the predicate indexes.
        dtype: of the table.
        batch: batch size B.
        heads: number of query heads Hq.
        n_q: number of queries.
        n_kv: number of keys.
        device: where the table will be read.
    """
    made = _mask_named(key).makers[index](device, n_q, n_kv, batch, heads)
    if made.dim() != rank:
        raise BadPattern(
            f"sparse_compile: a pattern made a table of shape {list(made.shape)} and reads it with "
            f"{rank} indices. Make it [{', '.join(['size'] * rank)}]."
        )
    # Memory of its own: what compiles the graph may reuse it, and the user's tensor may change
    # before the backward reads it.
    result: Tensor = made.to(device=device, dtype=dtype, copy=True)
    return result


@pattern_table.register_fake
def _(
    key: str,
    index: int,
    rank: int,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    n_q: int,
    n_kv: int,
    device: torch.device,
) -> Tensor:
    # The sizes are the pattern's own; nothing but other operators of this library reads them.
    return torch.empty([fresh_size() for _ in range(rank)], dtype=dtype, device=device)


@operator("check_promise", tags=_TAGS)
def check_promise(q: Tensor, masks: Sequence[Tensor], n_kv: int, key: str, plan: str) -> Tensor:
    """``q``, if the mask tensors of an attention are the pattern that they were promised to be.

    It stands in the way of ``q`` so that nothing removes it as unused.

    Args:
        q: the queries, [B, Hq, Nq, D].
        masks: the mask tensors.
        n_kv: number of keys.
        key: of the promised mask.
        plan: the text of :func:`promise_plan`.

    Raises:
        BrokenPromise: naming the first (b, h, q, kv) that differs.
    """
    read = json.loads(plan)
    batch, heads, n_q, _ = q.shape
    bound = _mask_named(key)
    tables = bound.tables(q.device, n_q, n_kv, batch, heads)
    keeps = [
        on_axes(_keep(mask, role, read["shown"]), read["axes"])
        for mask, role in zip(masks, read["roles"], strict=True)
    ]
    for b, h in _distinct(bound.expr, keeps, batch, heads):
        coordinates = _coordinates(b, h, n_q, n_kv, q.device)
        wanted = evaluate(bound.expr, coordinates, n_q, n_kv, tables)
        found = torch.ones(n_q, n_kv, dtype=torch.bool, device=q.device)
        for keep in keeps:
            found = found & keep[min(b, keep.shape[0] - 1), min(h, keep.shape[1] - 1)]
        if read["causal"]:
            causal = coordinates["kv"] <= coordinates["q"]
            # With is_causal the promise may be about the tensors, or about both together.
            found, wanted = found & causal, (wanted & causal if keeps else wanted)
        _raise_if_different(found, wanted.broadcast_to(n_q, n_kv), (b, h), read["shown"])
    return q.clone()


@check_promise.register_fake
def _(q: Tensor, masks: Sequence[Tensor], n_kv: int, key: str, plan: str) -> Tensor:
    return q.new_empty(q.shape)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.n_masks = len(inputs[1])


def _pass_on(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad, [None] * ctx.n_masks, None, None, None


check_promise.register_autograd(_pass_on, setup_context=_keep_nothing)

#: The operators as nodes of a graph call them.
PATTERN_TABLE = torch.ops.sparse_compile.pattern_table.default
CHECK_PROMISE = torch.ops.sparse_compile.check_promise.default


def promise_plan(roles: Sequence[str], axes: Sequence[str], causal: bool, shown: str) -> str:
    """How :func:`check_promise` reads the mask tensors.

    Args:
        roles: of each, as in :class:`sparse_compile.sites.site.MaskOperand`.
        axes: of the scores that they broadcast against.
        causal: SDPA's ``is_causal``.
        shown: the promise and where the attention stands, for the error.
    """
    fields = {"roles": list(roles), "axes": list(axes), "causal": causal, "shown": shown}
    return json.dumps(fields, separators=(",", ":"))


def _keep(mask: Tensor, role: str, shown: str) -> Tensor:
    if role != "add":
        return mask.bool() if role == "keep" else ~mask.bool()
    strange = (mask != 0) & ~(mask <= _HIDES)
    if bool(strange.any()):
        raise BrokenPromise(
            f"sparse_compile: broken promise of {shown}: its mask adds {mask[strange][0].item():g} "
            "to a score, which neither keeps nor hides it. Remove the promise."
        )
    return mask == 0


def on_axes(mask: Tensor, axes: Sequence[str]) -> Tensor:
    """As [b, h, q, kv], absent and broadcast axes of size one."""
    while mask.dim() > len(axes):
        mask = mask.squeeze(0)
    mask = mask[(None,) * (len(axes) - mask.dim())]
    for position, name in enumerate(_ORDER):
        if name not in axes:
            mask = mask.unsqueeze(position)
    return mask


def _distinct(
    expr: MaskExpr, keeps: Sequence[Tensor], batch: int, heads: int
) -> Iterator[tuple[int, int]]:
    """The (b, h) whose masks may differ from those before them."""
    names = {str(symbol) for symbol in expr.predicate.free_symbols}
    batches = batch if "b" in names or any(keep.shape[0] > 1 for keep in keeps) else 1
    per_head = heads if "h" in names or any(keep.shape[1] > 1 for keep in keeps) else 1
    return ((b, h) for b in range(batches) for h in range(per_head))


def _coordinates(b: int, h: int, n_q: int, n_kv: int, device: torch.device) -> dict[str, Tensor]:
    return {
        "b": torch.tensor(b, device=device),
        "h": torch.tensor(h, device=device),
        "q": torch.arange(n_q, device=device)[:, None],
        "kv": torch.arange(n_kv, device=device),
    }


def _raise_if_different(found: Tensor, wanted: Tensor, at: tuple[int, int], shown: str) -> None:
    wrong = found != wanted
    if not bool(wrong.any()):
        return
    q, kv = (int(i) for i in wrong.nonzero()[0])
    says = "lets this pair attend, the pattern does not"
    if wanted[q, kv]:
        says = "hides this pair, the pattern does not"
    raise BrokenPromise(
        f"sparse_compile: broken promise of {shown}: at (b={at[0]}, h={at[1]}, q={q}, kv={kv}) the "
        f"mask {says}. Correct the pattern or remove the promise."
    )

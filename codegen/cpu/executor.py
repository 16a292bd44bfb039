"""Block-sparse attention on the CPU: tiles of PyTorch's fused attention over the visited blocks.

Nothing of size n_q * n_kv is made: a tile reads the runs of keys its blocks name, through views,
and the results of several runs merge by log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.codegen import by_token
from sparse_compile.codegen.attend import Gradients
from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.cpu import flash
from sparse_compile.codegen.cpu.batches import Batch, Gathered, Part, Strided, cut, parts_of
from sparse_compile.codegen.cpu.bias import Bias, MaskCall
from sparse_compile.codegen.cpu.cache import BoundedCache, fingerprint
from sparse_compile.codegen.cpu.flash import Score, Tiles
from sparse_compile.codegen.cpu.plan import Plan, make_plan
from sparse_compile.layout import BlockLayout

#: Bytes that the gathered keys, or the gradients of the keys, of one call may take.
CHUNK_BYTES = 1 << 25
#: Scores whose mask is evaluated at once.
CHUNK_SCORES = 1 << 21


@torch.no_grad()
def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention over the visited blocks of the only view, which is in plain order.

    Returns:
        out [B, Hq, Nq, Dv] in q.dtype, stored as [B, Nq, Hq, Dv], and lse fp32 [B, Hq, Nq]; 0 and
        -inf on rows without a key.
    """
    q, k, v, (layout,) = call.q, call.k, call.v, call.blocks.views
    batch, heads, n_q, _ = q.shape
    plans = _plans(layout)
    width = max(q.shape[3], v.shape[3])
    operands = _widen(q, width), *_keys((k, v), width, plans, layout)
    wide = torch.promote_types(q.dtype, torch.float32)
    make = torch.empty if plans.complete else torch.zeros
    out = make(batch, n_q, heads, width, dtype=wide if plans.merges else q.dtype).transpose(1, 2)
    lse = torch.full((batch, heads, n_q), -math.inf, dtype=wide)
    mask, score = MaskCall.make(call), Score.of(call)
    for part in parts_of(call):
        qs, outs, lses = (part.query_side(x) for x in (operands[0], out, lse.unsqueeze(-1)))
        ks, vs = (part.key_side(x) for x in operands[1:])
        for piece, bias in _pieces(plans, part, mask, ks, held=score.is_held):
            keys, values = (part.per_head(piece.keys_of(x)) for x in (ks, vs))
            tiles = Tiles(piece.rows_of(qs), keys, values, bias, score.at(part, piece))
            _store(piece, outs, lses, *flash.forward(tiles))
    out = out[..., : v.shape[3]]
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse.float()


def _store(piece: Batch, out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """Put a result [tiles, heads, rows, width] in its place, merged with what is there."""
    new_lse = new_lse.unsqueeze(-1)
    if piece.merge:
        old_out, old_lse = piece.rows_of(out), piece.rows_of(lse)
        total = torch.logaddexp(old_lse, new_lse)
        # Rows that see nothing so far keep their 0: exp(-inf - 0) = 0, never NaN.
        weight = (new_lse - total.masked_fill(total == -math.inf, 0.0)).exp()
        old_out.lerp_(new_out.to(out.dtype), weight)
        old_lse.copy_(total)
        if isinstance(piece, Strided):
            return  # these were views
        new_out, new_lse = old_out, old_lse
    piece.put_rows(out, new_out)
    piece.put_rows(lse, new_lse)


@torch.no_grad()
def backward(call: AttentionCall, result: AttentionResult) -> Gradients:
    """Gradients of :func:`forward`.

    Returns:
        dq, dk and dv: by token, in the shapes of q, k and v; then those of the learned tensors
        that are wanted. The same bits at each call.
    """
    q, k, v, (layout,) = call.q, call.k, call.v, call.blocks.views
    out, lse, grad_out, grad_lse = result.out, result.lse, result.grad_out, result.grad_lse
    plans = _plans(layout)
    empty = lse == -math.inf
    if bool(empty.any()):
        lse = lse.masked_fill(empty, 0.0)
        grad_out = grad_out.masked_fill(empty.unsqueeze(-1), 0.0)
        grad_lse = None if grad_lse is None else grad_lse.masked_fill(empty, 0.0)
    wide = torch.promote_types(q.dtype, torch.float32)
    width = max(q.shape[3], v.shape[3])
    if grad_lse is not None:
        grad_out, out, width = _fold_in(grad_lse, grad_out, out, width)
    qw, grad, ow = (_widen(x, width) for x in (q, grad_out, out))
    kw, vw = _keys((k, v), width, plans, layout)
    row_dtype = wide if plans.merges else q.dtype
    make = torch.empty if plans.complete else torch.zeros
    dq = make(qw.shape, dtype=row_dtype)
    dk, dv = (torch.zeros(x.shape, dtype=wide) for x in (kw, vw))
    lse = lse.to(wide).unsqueeze(-1)
    mask, score = MaskCall.make(call), Score.of(call, result.wanted)
    for part in parts_of(call):
        rows = [part.query_side(x) for x in (grad, qw, ow, lse, dq)]
        keys = [part.key_side(x) for x in (kw, vw, dk, dv)]
        held = score.is_held
        for piece, bias in _pieces(plans, part, mask, keys[0], backward=True, held=held):
            _accumulate(piece, part, rows, keys, bias, score.at(part, piece))
    grads = ((dq, q), (dk, k), (dv, v))
    dq, dk, dv = (by_token.stored(dx, x) for dx, x in grads)
    return dq, dk, dv, *score.learned_gradients()


def _accumulate(
    piece: Batch,
    part: Part,
    rows: list[Tensor],
    keys: list[Tensor],
    bias: Bias | None,
    score: Score,
) -> None:
    grad, q, out, lse = (piece.rows_of(x) for x in rows[:4])
    k, v = (part.per_head(piece.keys_of(x)) for x in keys[:2])
    tiles = Tiles(q, k, v, bias, score)
    dq, dk, dv = flash.backward(tiles, grad, out, lse[..., 0])
    if piece.merge:
        piece.add_rows(rows[4], dq)
    else:
        piece.put_rows(rows[4], dq)
    piece.add_keys(keys[2], part.over_heads(dk))
    piece.add_keys(keys[3], part.over_heads(dv))


def _fold_in(
    grad_lse: Tensor, grad_out: Tensor, out: Tensor, width: int
) -> tuple[Tensor, Tensor, int]:
    """One more column, through which the gradient of lse flows, and the new common width.

    The gradient of a score is weight * (grad . v - grad . out + grad_lse). With a column of 1 in
    grad, 0 in v and -grad_lse in out, the operator computes just that.
    """
    column = -grad_lse.unsqueeze(-1).to(out.dtype)
    grad_out = torch.cat([_widen(grad_out, width), torch.ones_like(column)], -1)
    return grad_out, torch.cat([_widen(out, width), column], -1), -(-(width + 1) // 16) * 16


def _widen(x: Tensor, width: int) -> Tensor:
    """x [..., n] with zeros appended to [..., width], last stride 1."""
    if x.shape[-1] < width:
        return torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _keys(
    tensors: Sequence[Tensor], width: int, plans: _Plans, layout: BlockLayout
) -> list[Tensor]:
    """K and V, widened; stored in whole blocks where blocks are gathered."""
    widened = [_widen(x, width) for x in tensors]
    if not plans.gathers:
        return widened
    missing = -layout.n_kv % layout.block_kv
    return [torch.nn.functional.pad(x, (0, 0, 0, missing)).contiguous() for x in widened]


@dataclass(frozen=True)
class _Plans:
    """A plan for each class of a layout.

    Attributes:
        of_class: the plans.
        name: tells them from those of other layouts.
        merges: whether any batch merges, so that partial results are needed in fp32.
        gathers: whether any batch is gathered, so that keys must be stored in whole blocks.
        complete: whether every query of every class belongs to some batch.
        nbytes: bytes held, about.
    """

    of_class: tuple[Plan, ...]
    name: bytes
    merges: bool
    gathers: bool
    complete: bool
    nbytes: int

    @staticmethod
    def make(layout: BlockLayout, name: bytes) -> _Plans:
        """The plans of a layout."""
        plans = tuple(make_plan(layout, i) for i in range(layout.classes))
        batches = [batch for plan in plans for batch in plan.batches]
        merges, complete = any(b.merge for b in batches), all(plan.complete for plan in plans)
        gathers = any(isinstance(batch, Gathered) for batch in batches)
        return _Plans(plans, name, merges, gathers, complete, sum(b.nbytes for b in batches))


_PLANS: BoundedCache[_Plans] = BoundedCache(max_bytes=1 << 26)


def _plans(layout: BlockLayout) -> _Plans:
    blocks = layout.block_q, layout.block_kv
    shape = torch.tensor([layout.n_q, layout.n_kv, *blocks, layout.heads, layout.listed])
    name = fingerprint([shape, *layout.rows.tensors()])
    assert name is not None
    return _PLANS.get(name, lambda: _Plans.make(layout, name))


def _pieces(
    plans: _Plans,
    part: Part,
    call: MaskCall,
    keys: Tensor,
    backward: bool = False,
    held: bool = False,
) -> Iterator[tuple[Batch, Bias | None]]:
    """The batches of a part in pieces of bounded memory, each with its bias.

    ``held``: all scores of a piece exist at once.
    """
    mask = call.at(part.batch, part.heads.start)
    for i, batch in enumerate(plans.of_class[part.layout_class].batches):
        shared = mask.is_shared(batch)
        bytes_per_tile = 2 * len(part.heads) * batch.length * keys.shape[-1] * keys.element_size()
        most = batch.tiles
        if backward or held or not shared:
            most = min(most, CHUNK_BYTES // bytes_per_tile)
        if not shared:
            most = min(most, CHUNK_SCORES // (batch.rows * batch.length))
        if held:
            most = min(most, CHUNK_SCORES // (len(part.heads) * batch.rows * batch.length))
        for j, piece in enumerate(cut(batch, max(1, most))):
            name = (plans.name, part.layout_class, i, None if shared else (most, j))
            yield piece, mask.bias(piece, name)

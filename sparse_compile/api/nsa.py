"""Native Sparse Attention: three attentions, weighted by the gates of the model."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparse_compile.api.attention import attend, attention
from sparse_compile.errors import BadShape, PatternMisuse
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.expr.nodes import size_symbol
from sparse_compile.ops.nsa import NSA_SELECT
from sparse_compile.ops.operands import check_operands
from sparse_compile.patterns.checks import LOWER_RIGHT
from sparse_compile.patterns.learned import NSA
from sparse_compile.patterns.local import Causal
from sparse_compile.selection import Selection
from sparse_compile.sites.named import LISTS, NamedMask, NamedPart

#: From windows of keys or values [B, Hkv, Nc, length, D] to one each, [B, Hkv, Nc, D].
Compress = Callable[[Tensor], Tensor]
Three = tuple[Tensor, Tensor, Tensor]

_PAPER = NSA()


def native_sparse_attention(
    q: Tensor,
    k: Tensor | Three,
    v: Tensor | Three,
    gates: Tensor | Three,
    pattern: NSA = _PAPER,
    *,
    compress: Compress | tuple[Compress, Compress] | None = None,
    compressed: tuple[Tensor, Tensor] | None = None,
    selection: Selection | None = None,
    scale: float | None = None,
) -> Tensor:
    """Native Sparse Attention (Yuan et al. 2025, https://arxiv.org/abs/2502.11089).

    The sum of three causal attentions, each weighted by its gate: to compressed keys, each of which
    stands for a window of keys and is seen once all of it is past; to the blocks that the first one
    likes best, summed over the heads that share a key head; and to near keys. Gradients reach q, k,
    v, the gates and what compresses; none flows through the choice of the blocks, as in the paper.

    Args:
        q: [B, Hq, Nq, D], float32, float16 or bfloat16.
        k: [B, Hkv, Nkv, D], same dtype; Hkv divides Hq. Or three of them, for the compressed, the
            selected and the near keys, as the paper has it.
        v: [B, Hkv, Nkv, Dv], same dtype; or three of them.
        gates: [B, Hq, Nq, 3], for the compressed, the selected and the near keys, or three of
            [B, Hq, Nq]. They are factors as they are: apply the sigmoid of the paper yourself.
        pattern: the settings.
        compress: a function or module, or one for keys and one for values: from overlapping windows
            [B, Hkv, pattern.compressed(Nkv), length, D or Dv] to their sizes without ``length``.
            The mean unless given.
        compressed: compressed keys and values, if they are there already.
        selection: what :func:`nsa_selection` returned, to use it again; made here unless given.
        scale: factor on the scores; 1 / sqrt(D) unless given.

    Returns:
        [B, Hq, Nq, Dv] in the dtype of q. A query that sees no compressed key gets 0 for them.

    Raises:
        BadShape, UnsupportedDtype, PatternMisuse: what does not fit together.

    >>> q, k = torch.randn(1, 4, 100, 16), torch.randn(1, 2, 100, 16)
    >>> native_sparse_attention(q, k, k, torch.rand(1, 4, 100, 3)).shape
    torch.Size([1, 4, 100, 16])
    """
    weights, keys, values = _gates(gates, q), _three(k), _three(v)
    _check(q, keys, values, pattern, compress is not None and compressed is not None)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    coarse = _compressed(keys[0], values[0], pattern, compress, compressed)
    if selection is None:
        selection = _selected_by(q, keys[1], coarse[0], pattern, factor)
    attended = (
        _to_compressed(q, *coarse, pattern, keys[0].shape[2], factor),
        _to_selected(q, keys[1], values[1], selection, pattern, factor),
        attention(q, keys[2], values[2], pattern.near, factor),
    )
    first, second, third = (w * o for w, o in zip(weights, attended, strict=True))
    return (first + second + third).to(q.dtype)


def nsa_selection(
    q: Tensor,
    k: Tensor,
    pattern: NSA = _PAPER,
    *,
    compress: Compress | tuple[Compress, Compress] | None = None,
    compressed: Tensor | None = None,
    scale: float | None = None,
) -> Selection:
    """What Native Sparse Attention selects, to be used by several layers.

    Args:
        q, k, pattern, compress, scale: as for :func:`native_sparse_attention`.
        compressed: the compressed keys, if they are there already.

    Returns:
        lists [B, Hkv, Nq, K] of a fixed K, without gradient.

    >>> found = nsa_selection(torch.randn(1, 4, 100, 16), torch.randn(1, 2, 100, 16))
    >>> found.index.shape, found.unit_kv
    (torch.Size([1, 2, 100, 2]), 64)
    """
    _check(q, [k], [k], pattern, compress is not None and compressed is not None)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    given = None if compressed is None else (compressed, compressed)
    coarse = _compressed(k, k, pattern, compress, given)[0]
    return _selected_by(q, k, coarse, pattern, factor)


def _check(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], pattern: NSA, both: bool
) -> None:
    if not isinstance(pattern, NSA):
        raise PatternMisuse(
            f"sparse_compile: native_sparse_attention() got the pattern {pattern!r}. Write "
            "patterns.NSA(...)."
        )
    if both:
        raise PatternMisuse(
            "sparse_compile: native_sparse_attention() got both compress and compressed. Pass one: "
            "what compresses, or what is compressed already."
        )
    if any([part.shape[:3] != keys[0].shape[:3] for part in (*keys, *values)]):
        shapes = [list(part.shape) for part in (*keys, *values)]
        raise BadShape(
            f"sparse_compile: native_sparse_attention() got keys and values {shapes}. Pass the "
            "same batch, heads and length for all branches."
        )
    if not torch.compiler.is_compiling():
        # The operators repeat the check of the operands while they are compiled.
        for key, value in zip(keys, values, strict=True):
            check_operands(q, key, value)


def _three(given: Tensor | Three) -> Three:
    if isinstance(given, Tensor):
        return given, given, given
    if len(given) != 3:
        raise BadShape(
            f"sparse_compile: native_sparse_attention() got {len(given)} tensors of keys or "
            "values. Pass one, or three: for compressed, selected and near keys."
        )
    return given


def _gates(gates: Tensor | Three, q: Tensor) -> list[Tensor]:
    """The three gates, each [B, Hq, Nq, 1]."""
    if isinstance(gates, Tensor):
        found, shape = [gates], [*q.shape[:3], 3]
        parts = list(gates.unsqueeze(-1).unbind(-2)) if gates.dim() == 4 else []
    else:
        found, shape = list(gates), list(q.shape[:3])
        parts = [gate.unsqueeze(-1) for gate in found]
    if len(parts) != 3 or any([list(gate.shape) != shape for gate in found]):
        raise BadShape(
            f"sparse_compile: native_sparse_attention() got gates {[list(g.shape) for g in found]} "
            f"for q {list(q.shape)}. Pass one of {[*q.shape[:3], 3]}, or three of "
            f"{list(q.shape[:3])}."
        )
    return parts


def _compressed(
    k: Tensor,
    v: Tensor,
    pattern: NSA,
    compress: Compress | tuple[Compress, Compress] | None,
    compressed: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """The compressed keys and values, in the dtype of the others."""
    wanted = [k.shape[0], k.shape[1], pattern.compressed(k.shape[2])]
    if compressed is None:
        by = compress if isinstance(compress, tuple) else (compress, compress)
        compressed = _windows(k, pattern, by[0]), _windows(v, pattern, by[1])
    for made, source in zip(compressed, (k, v), strict=True):
        if list(made.shape) != [*wanted, source.shape[3]]:
            raise BadShape(
                f"sparse_compile: native_sparse_attention() got compressed keys or values "
                f"{list(made.shape)} for {list(source.shape)}. Return or pass "
                f"{[*wanted, source.shape[3]]}: one for each window of {pattern.length} keys, "
                f"which start {pattern.stride} apart."
            )
    return compressed[0].to(k.dtype), compressed[1].to(v.dtype)


def _windows(tokens: Tensor, pattern: NSA, compress: Compress | None) -> Tensor:
    if pattern.compressed(tokens.shape[2]) == 0:
        return tokens[:, :, :0]
    if compress is None:
        return _means(tokens, pattern)
    return compress(tokens.unfold(2, pattern.length, pattern.stride).transpose(3, 4))


def _means(tokens: Tensor, pattern: NSA) -> Tensor:
    """The means of all windows, which share the sums of the cells that they overlap in."""
    windows, span = pattern.compressed(tokens.shape[2]), pattern.length // pattern.stride
    cells = tokens.unfold(2, pattern.stride, pattern.stride).sum(-1, dtype=torch.float32)
    # Not slices: torch.compile would compare their ends with a length that it knows by name.
    shifted = [cells.narrow(2, shift, windows) for shift in range(span)]
    return torch.stack(shifted).sum(0) / pattern.length


def _selected_by(q: Tensor, k: Tensor, coarse: Tensor, pattern: NSA, scale: float) -> Selection:
    chosen = pattern.selection
    counts = pattern.block, pattern.k, pattern.length, pattern.stride, pattern.sink, pattern.local
    index, count = NSA_SELECT(
        q.detach(), k.detach(), coarse.detach(), [chosen.unit_kv, *counts], pattern.align, scale
    )
    return Selection(index, count, 1, chosen.unit_kv)


def _to_compressed(
    q: Tensor, k: Tensor, v: Tensor, pattern: NSA, n_kv: int, scale: float
) -> Tensor:
    """The attention to compressed keys; ``n_kv`` counts those that they stand for."""
    if k.shape[2] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    late = pattern.align == LOWER_RIGHT
    text = _past_windows(pattern.length, pattern.stride, late)
    return attend((q, k, v), text, scale, sizes=[n_kv - q.shape[2]] if late else [])


def _to_selected(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, pattern: NSA, scale: float
) -> Tensor:
    text = _past_keys(pattern.align, selection.unit_q, selection.unit_kv)
    return attend((q, k, v), text, scale, [selection.index, selection.count])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _past_windows(length: int, stride: int, late: bool) -> str:
    """The mask of compressed keys."""
    return _named_windows(length, stride, late).text


@functools.lru_cache(maxsize=64)
def _named_windows(length: int, stride: int, late: bool) -> NamedMask:
    """A window is seen once all of it is past; ``s0`` says how many keys came before query 0."""
    place = Q + size_symbol(0) if late else Q
    mask = MaskExpr(stride * KV + (length - 1) <= place, n_sizes=int(late))
    return NamedMask(NamedPart(mask))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _past_keys(align: str, unit_q: int, unit_kv: int) -> str:
    """The mask of selected keys."""
    return _named_keys(align, unit_q, unit_kv).text


@functools.lru_cache(maxsize=64)
def _named_keys(align: str, unit_q: int, unit_kv: int) -> NamedMask:
    past = NamedPart(Causal(align).bound().expr)
    return NamedMask(None, past, LISTS, (unit_q, unit_kv), "Native Sparse Attention")

"""attention: block-sparse attention as a function of q, k, v and a mask."""

from __future__ import annotations

import math

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile import ops
from sparse_compile.api.plan import NOTHING_HIDDEN, Direct, plan_of, static_data
from sparse_compile.api.selected import Sizes, lists_of, spec_text
from sparse_compile.errors import BadShape, PatternMisuse
from sparse_compile.expr import COORDINATES, MaskExpr
from sparse_compile.layout.dense_tables import NO_READS, DenseRead
from sparse_compile.ops.operands import WIDEST, WIDEST_UNITS, check_operands
from sparse_compile.patterns.base import Pattern
from sparse_compile.patterns.nsa import NSA

#: Stands for lengths and head counts that torch.compile knows by name only.
_UNKNOWN = 4096


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Pattern | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention that computes only what its mask allows; differentiable.

    It can be called anywhere, also in code that torch.compile compiles, with any backend. There, a
    pattern that holds a function, or tensors that it does not select by, must come from outside:
    from a global, an argument or a module. It may be combined there with others.

    Args:
        q: [B, Hq, Nq, D], float32, float16 or bfloat16.
        k: [B, Hkv, Nkv, D], same dtype; Hkv divides Hq.
        v: [B, Hkv, Nkv, Dv], same dtype.
        mask: who may attend to whom: a pattern, or a tensor that broadcasts to [B, Hq, Nq, Nkv]:
            bool, True to attend, or floating, added to the scores, of 0 and -inf alone. Its blocks
            are found in one pass over it, in each call. None: everyone to everyone. In a
            pattern that selects keys, the static part is attended to anyway, and the selection is
            made among the others.
        scale: factor on the scores; 1 / sqrt(D) unless given.

    Returns:
        [B, Hq, Nq, Dv]; 0 for a query that may attend to nothing.

    Raises:
        BadShape, UnsupportedDtype: q, k, v and the mask do not fit together.
        BadPattern: the pattern does not fit these lengths, or the tensor is a bias.
        PatternMisuse: the mask is of another kind.

    >>> from sparse_compile import patterns
    >>> q = torch.randn(1, 2, 100, 16)
    >>> attention(q, q, q, patterns.SlidingWindow(15, 0)).shape
    torch.Size([1, 2, 100, 16])
    """
    if not torch.compiler.is_compiling():
        # Operators repeat it while they are compiled. Attention to blocks takes less, see below.
        check_operands(q, k, v, WIDEST_UNITS if isinstance(mask, Pattern) else WIDEST)
        if isinstance(mask, Pattern):
            mask.check(q.shape[2], k.shape[2], q.shape[0], q.shape[1])
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if isinstance(mask, Tensor):
        return _by_tensor(q, k, v, mask, factor)
    if mask is not None and not isinstance(mask, Pattern):
        raise PatternMisuse(_no_mask(mask))
    given: list[Tensor] = []
    sizes = views_sizes(q, k)
    plan = NOTHING_HIDDEN if mask is None else plan_of(mask, q.device.type, sizes, given)
    if plan[0] and not torch.compiler.is_compiling():
        check_operands(q, k, v)
    if mask is None or not (plan[0] or plan[4]):
        return _by_sdpa(q, k, v, plan[3], factor)
    tables, lists, text = _mask_data(q, k, v, mask, plan, given)
    out: Tensor = ops.ATTENTION(q, k, v, [], tables, [], lists, factor, text)[0]
    return out


def _mask_data(
    q: Tensor, k: Tensor, v: Tensor, mask: Pattern, plan: Direct, given: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], str]:
    """The tables and the lists of a pattern, and the text of the spec."""
    text, _, _, _, selected = plan
    tables, lists = static_data(q, k, mask, plan) if text else ([], [])
    if selected is None:
        return tables, lists, text
    index, count, more = lists_of(q, k, mask, selected, given)
    tables, lists = [*tables, *more], [*lists, index, count]
    if not selected[5] or q.shape[3] > WIDEST[0] or v.shape[3] > WIDEST[1]:
        return tables, lists, selected[0]
    shape = q.shape[0], q.shape[1], q.shape[2], k.shape[2], k.shape[1]
    lists = ops.LAYOUT(tables, NO_READS, [], *shape, selected[5], q.device, lists)
    return tables, lists, selected[5]


def _by_sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type == "cpu" and q.dtype != torch.float32:
        # The CPU's own kernel for grouped heads adds up dV in half precision.
        group, grouped = q.shape[1] // k.shape[1], False
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def views_sizes(q: Tensor, k: Tensor) -> Sizes:
    """What views are chosen for: n_q, n_kv, batch and heads.

    Only their cost depends on it: lengths are rounded, and code that is being compiled, which may
    run at any lengths, gets views for usual ones.
    """
    if torch.compiler.is_compiling():
        return _UNKNOWN, _UNKNOWN, 1, 1
    n_q, n_kv = (1 << max(t.shape[2] - 1, 0).bit_length() for t in (q, k))
    return n_q, n_kv, q.shape[0], q.shape[1]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _plan_of_tensor(shared: tuple[bool, ...], device: str) -> tuple[str, str]:
    """The spec of a mask tensor, and how it is read.

    Args:
        shared: of each of its axes, whether it has size one.
        device: type of the device.
    """
    names = [symbol.name for symbol in COORDINATES][4 - len(shared) :]
    axes = tuple("" if one else name for one, name in zip(shared, names, strict=True))
    read = DenseRead(0, axes)
    expr = MaskExpr(sympy.Ne(read.bit, 0), ("int32",))
    return spec_text(expr, device, (_UNKNOWN, _UNKNOWN, 1, 1)), DenseRead.text([read])


def _by_tensor(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise PatternMisuse(
            f"sparse_compile: attention() got a mask of {mask.dtype}. Pass a bool tensor, True to "
            "attend, or a floating one of 0 and -inf that is added to the scores."
        )
    if mask.requires_grad:
        raise PatternMisuse(
            "sparse_compile: attention() got a mask that requires grad. Only whether a pair "
            "attends is read from it, which has no gradient: pass mask.detach()."
        )
    lengths = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    wanted = lengths[4 - mask.dim() :] if mask.dim() <= 4 else ()
    fits = [size in (1, want) for size, want in zip(mask.shape, wanted, strict=False)]
    if len(fits) < mask.dim() or not all(fits):
        raise BadShape(
            f"sparse_compile: attention() got a mask of shape {list(mask.shape)}, which does not "
            f"broadcast to [B, Hq, Nq, Nkv] = {list(lengths)}. Use unsqueeze to add missing axes."
        )
    shared = tuple([size == 1 for size in mask.shape])
    text, reads = _plan_of_tensor(shared, q.device.type)
    bits, *lists = ops.LAYOUT([mask], reads, [], *lengths, k.shape[1], text, q.device, [])
    out: Tensor = ops.ATTENTION(q, k, v, [], [bits], [], lists, scale, text)[0]
    return out


def _no_mask(mask: object) -> str:
    if isinstance(mask, NSA):
        return (
            f"sparse_compile: attention() got {mask!r}, which is no mask but the sum of three "
            "attentions. Call native_sparse_attention(q, k, v, gates, pattern)."
        )
    return (
        f"sparse_compile: attention() got a mask of type {type(mask).__name__}. Pass a pattern of "
        "sparse_compile.patterns, a bool tensor, a floating one of 0 and -inf, or None."
    )

"""attention: block-sparse attention as a function of q, k, v and a mask."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile import ops
from sparse_compile.api.data import data_of, given_data, tables_of
from sparse_compile.api.plan import Direct, capped, name_at_once, name_of, planned
from sparse_compile.api.select import lists_of, selected_of
from sparse_compile.codegen.generators import ShapeNeed
from sparse_compile.errors import BadDevice, BadShape, PatternMisuse
from sparse_compile.expr import COORDINATES, MaskExpr
from sparse_compile.layout.from_dense import NO_READS, DenseRead
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.layout.views.split_views import rounded
from sparse_compile.ops.composite import composed_of
from sparse_compile.ops.fresh_size import told_apart
from sparse_compile.ops.masked import MASKED_ATTENTION, MASKED_ATTENTION_AND_LSE
from sparse_compile.ops.operands import WIDEST, WIDEST_UNITS, check_operands
from sparse_compile.ops.untraced import untraced
from sparse_compile.passes.decide.pick import views_for
from sparse_compile.patterns.base import Pattern
from sparse_compile.patterns.learned import NSA
from sparse_compile.selection.split import without_selection
from sparse_compile.sites.named import BY_TENSOR, EVERYONE, GIVEN, TENSOR, NamedMask

#: Stands for lengths and head counts that torch.compile knows by name only.
_UNKNOWN = 4096
_EVERYONE, _BY_TENSOR = EVERYONE.text, BY_TENSOR.text
#: Operations of a forward from which the kernels of blocks repay the lists that they need, which
#: those of units do not: between 2e11 and 9e11 on an H200 (benchmarks/results/listed_h200.json).
BLOCK_FLOPS = 5e11
#: q, k and v.
Operands = tuple[Tensor, Tensor, Tensor]
#: Text of a spec, tables and lists: what the operator of attention is told of a mask.
_Data = tuple[str, list[Tensor], list[Tensor]]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Pattern | Tensor | None = None,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
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
        softcap: scores become ``softcap * tanh(score / softcap)`` before the mask, as in Gemma 2; a
            constant of compiled code. None or 0: they stay.
        sinks: [Hq], floating: for each query head the score of one more key, whose value is 0, as
            in GPT-OSS; it has gradients.

    Returns:
        [B, Hq, Nq, Dv]; 0 for a query that may attend to nothing.

    Raises:
        BadShape, BadDevice, UnsupportedDtype: q, k, v and the mask do not fit together.
        BadPattern: the pattern does not fit these lengths, or the tensor is a bias.
        PatternMisuse: the mask is of another kind.

    >>> from sparse_compile import patterns
    >>> q = torch.randn(1, 2, 100, 16)
    >>> attention(q, q, q, patterns.SlidingWindow(15, 0)).shape
    torch.Size([1, 2, 100, 16])
    """
    _check((q, k, v), mask, sinks)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    given: list[Tensor] = []
    owner = mask if isinstance(mask, Pattern) else None
    name = name_of if torch.compiler.is_compiling() else name_at_once
    text = _EVERYONE if owner is None else name(owner, given)
    if isinstance(mask, Tensor):
        text, given = _BY_TENSOR, [mask]
    text = capped(text, softcap) if softcap else text
    return attend((q, k, v), text, factor, given, sinks, owner=owner)


def _check(operands: Operands, mask: Pattern | Tensor | None, sinks: Tensor | None) -> None:
    """Raise before anything runs; operators repeat what is not checked while they are compiled."""
    q, k, _ = operands
    if not (mask is None or isinstance(mask, (Pattern, Tensor))):
        raise PatternMisuse(_no_mask(mask))
    if not torch.compiler.is_compiling():
        # Attention to blocks takes less, see below.
        check_operands(*operands, WIDEST_UNITS if isinstance(mask, Pattern) else WIDEST)
        _check_data(q=q, mask=mask, sinks=sinks)
        if isinstance(mask, Pattern):
            mask.check(q.shape[2], k.shape[2], q.shape[0], q.shape[1])
    if isinstance(mask, Tensor):
        _check_mask(q, operands[1], mask)
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise BadShape(
            f"sparse_compile: attention() got sinks of shape {list(sinks.shape)}. Give [Hq], one "
            f"for each of {q.shape[1]} query heads."
        )


def _check_data(**given: object) -> None:
    for name, tensor in given.items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise BadDevice(
                f"sparse_compile: attention() got {name} on the meta device, which holds no data. "
                "Move it to the CPU or a GPU."
            )


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """``out`` [B, Hq, Nq, Dv] times the share of the weight that keys get beside the sinks."""
    share = torch.sigmoid(lse - sinks.float()[:, None])
    return (out * share[..., None]).to(out.dtype)


def attend(
    operands: Operands,
    text: str,
    scale: float,
    given: Sequence[Tensor] = (),
    sinks: Tensor | None = None,
    *,
    sizes: Sequence[int] = (),
    owner: Pattern | None = None,
) -> Tensor:
    """Attention with a named mask: one node in a graph that is captured, or at once.

    Args:
        operands: q, k and v, as for :func:`attention`; ``scale`` and ``sinks``, too.
        text: of a :class:`sparse_compile.sites.named.NamedMask`.
        given: the tensors that it selects by, or is, or reads.
        sizes: its integers.
        owner: the pattern; what it makes is kept while it does not change.
    """
    if torch.compiler.is_compiling():
        out: Tensor = MASKED_ATTENTION(*operands, list(given), sinks, list(sizes), text, scale)
        return out
    return _direct(operands, list(given), sinks, sizes, text, scale, owner)


def attend_with_lse(
    operands: Operands,
    text: str,
    scale: float,
    given: Sequence[Tensor] = (),
    *,
    sizes: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """:func:`attend`, and the natural log-sum-exp of the scores [B, Hq, Nq] in fp32, with a
    gradient; -inf where a query may attend to nothing.
    """
    if torch.compiler.is_compiling():
        call = *operands, list(given), None, list(sizes), text, scale
        out, lse = MASKED_ATTENTION_AND_LSE(*call)
        return out, lse
    return _with_lse(operands, list(given), None, sizes, text, scale)


def _direct(
    operands: Operands,
    given: list[Tensor],
    sinks: Tensor | None,
    sizes: Sequence[int],
    text: str,
    scale: float,
    owner: Pattern | None = None,
) -> Tensor:
    """The same, in terms of the operators with kernels."""
    q, k, v = operands
    if NamedMask.parse(text).selects != TENSOR and sinks is None:
        plan = planned(text, q.device.type, _usual(q, k))
        if not plan.spec:
            return _by_sdpa(q, k, v, plan.causal, scale)
    return _with_lse(operands, given, sinks, sizes, text, scale, owner)[0]


def _with_lse(
    operands: Operands,
    given: list[Tensor],
    sinks: Tensor | None,
    sizes: Sequence[int],
    text: str,
    scale: float,
    owner: Pattern | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, that without the sinks, by this library's own kernels."""
    (q, k, v), named = operands, NamedMask.parse(text)
    learned: list[Tensor] = []
    if named.selects == TENSOR:
        spec, tables, lists = _tensor_data(q, k, given[0], text)
    else:
        plan = planned(text, q.device.type, _usual(q, k), True)
        if named.static is not None and named.static.key == GIVEN:
            lengths = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
            count = len(named.static.mask.tables)
            spec, learned = plan.spec, given[count:]
            call = lengths, k.shape[1], tuple(sizes), plan.static, q.device
            tables, lists = given_data(given[:count], call)
        else:
            spec, tables, lists = _pattern_data(operands, given, sizes, text, plan, owner)
    out, lse = ops.ATTENTION(q, k, v, learned, tables, list(sizes), lists, scale, spec)
    return (out if sinks is None else _with_sinks(out, lse, sinks)), lse


def _pattern_data(
    operands: Operands,
    given: list[Tensor],
    sizes: Sequence[int],
    text: str,
    plan: Direct,
    owner: Pattern | None,
) -> _Data:
    """What the operator of attention is told of a pattern; arguments as for :func:`attend`."""
    (q, k, v), named = operands, NamedMask.parse(text)
    if named.selected is None:
        check_operands(q, k, v)
    lengths, kv_heads = (q.shape[0], q.shape[1], q.shape[2], k.shape[2]), k.shape[1]
    spec = plan.spec
    tables: list[Tensor] = []
    lists: list[Tensor] = []
    if named.static is not None:
        rest = owner if owner is None or named.selected is None else without_selection(owner)
        made = named.static.key, tables_of(named.static.mask)
        call = *made, lengths, kv_heads, tuple(sizes), plan.static, q.device
        tables, lists = data_of(rest, call)
    selected = selected_of(text)
    if selected is not None:
        index, count, more = lists_of(q, k, selected, given, owner)
        tables, lists = [*tables, *more], [*lists, index, count]
        if plan.blocks and _fits_blocks(q, v, index, named.units):
            spec = plan.blocks
            where = spec, q.device, lists, told_apart()
            lists = ops.LAYOUT(tables, NO_READS, [], *lengths, kv_heads, *where)
    return spec, tables, lists


composed_of(MASKED_ATTENTION, _direct)
composed_of(MASKED_ATTENTION_AND_LSE, _with_lse)


def _fits_blocks(q: Tensor, v: Tensor, index: Tensor, units: tuple[int, int]) -> bool:
    """Whether the kernels of blocks can compute a selection, and repay making its lists."""
    pairs = math.prod(index.shape[2:]) * math.prod(units) * q.shape[0] * q.shape[1]
    fits = q.shape[3] <= WIDEST[0] and v.shape[3] <= WIDEST[1]
    return bool(fits and 2 * pairs * (q.shape[3] + v.shape[3]) >= BLOCK_FLOPS)


def _by_sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    grouped = bool(q.shape[1] != k.shape[1])
    if grouped and q.device.type == "cpu" and q.dtype != torch.float32:
        # The CPU's own kernel for grouped heads adds up dV in half precision.
        group, grouped = q.shape[1] // k.shape[1], False
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _usual(q: Tensor, k: Tensor) -> ProblemShape:
    """The problem that views are chosen for, which is only a matter of their cost.

    Lengths are rounded, and those that are known by name only get views for usual ones.
    """
    shape = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    batch, heads, n_q, n_kv = (size if isinstance(size, int) else None for size in shape)
    lengths = [_UNKNOWN if n is None else rounded(n) for n in (n_q, n_kv)]
    return ProblemShape(batch or 1, heads or 1, *lengths)


@functools.lru_cache(maxsize=64)
@untraced
def _plan_of_tensor(shared: tuple[bool, ...], device: str, text: str) -> tuple[str, str]:
    """The spec of a mask tensor, and how it is read.

    Args:
        shared: of each of its axes, whether it has size one.
        device: type of the device.
        text: of the :class:`NamedMask`, which says what becomes of scores.
    """
    names = [symbol.name for symbol in COORDINATES][4 - len(shared) :]
    axes = tuple("" if one else name for one, name in zip(shared, names, strict=True))
    read = DenseRead(0, axes)
    expr = MaskExpr(sympy.Ne(read.bit, 0), ("int32",))
    spec, _ = views_for(expr, ShapeNeed.on(device), ProblemShape(1, 1, _UNKNOWN, _UNKNOWN))
    return replace(spec, score=NamedMask.parse(text).score).text, DenseRead.text([read])


def _check_mask(q: Tensor, k: Tensor, mask: Tensor) -> None:
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


def _tensor_data(q: Tensor, k: Tensor, mask: Tensor, text: str) -> _Data:
    """What the operator of attention is told of a mask tensor, which is read here."""
    lengths = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    shared = tuple([bool(size == 1) for size in mask.shape])
    spec, reads = _plan_of_tensor(shared, q.device.type, text)
    nothing: list[Tensor] = []
    where = spec, q.device, nothing, told_apart()
    bits, *lists = ops.LAYOUT([mask], reads, [], *lengths, k.shape[1], *where)
    return spec, [bits], lists


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

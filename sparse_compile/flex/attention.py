"""flex_attention: the function of torch, computed by this library."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest
from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask

from sparse_compile.api.attention import attend, attend_with_lse
from sparse_compile.errors import BadPattern, BadShape, PatternMisuse, WeightsNeeded
from sparse_compile.flex.block_mask import BlockMask, meaning_of
from sparse_compile.flex.program import program_of
from sparse_compile.flex.record import Recorded, given, record
from sparse_compile.flex.signatures import like_torch
from sparse_compile.ops.operands import check_operands
from sparse_compile.sites.named import GIVEN, NamedMask, NamedPart

#: A tensor of a program: its number among the recorded ones, and the dtype that is read.
_Read = tuple[int, str]


@like_torch
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: TorchBlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Any:
    """``torch.nn.attention.flex_attention.flex_attention``, by this library's layouts and kernels.

    It runs as it stands and in code that torch.compile compiles, with any backend, forward and
    backward. Tensors that ``score_mod`` reads get gradients; other ones of the same shapes compile
    nothing.

    Args:
        query: [B, Hq, Nq, D], float32, float16 or bfloat16.
        key: [B or 1, Hkv, Nkv, D], same dtype.
        value: [B or 1, Hkv, Nkv, Dv], same dtype.
        score_mod: ``fn(score, b, h, q_idx, kv_idx)``, what becomes of a score; -inf hides a pair.
        block_mask: of :func:`sparse_compile.flex.create_block_mask`, or one of torch's.
        scale: factor on the products; 1 / sqrt(D) unless given.
        enable_gqa: whether Hkv may be another number than Hq, which it divides.
        return_lse: return the log-sum-exp of the scores, too.
        kernel_options: for the kernels of torch: taken, and without effect.
        return_aux: what else to return; the largest scores are not known.

    Returns:
        [B, Hq, Nq, Dv], 0 for a query that may attend to nothing; with ``return_lse`` also
        [B, Hq, Nq] in float32; with ``return_aux`` also a torch ``AuxOutput``.

    Raises:
        Inexpressible: a function does what no expression can say; says which operation.
        BadShape, BadPattern, UnsupportedDtype, PatternMisuse: arguments do not fit together.
        WeightsNeeded: the largest scores are asked for.

    >>> from sparse_compile.flex import create_block_mask
    >>> causal = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 100, 100, device="cpu")
    >>> q = torch.randn(1, 2, 100, 16)
    >>> flex_attention(q, q, q, lambda s, b, h, q, kv: s - (q - kv) / 8, causal).shape
    torch.Size([1, 2, 100, 16])
    """
    key, value = _check(query, key, value, block_mask, enable_gqa)
    _note_options(kernel_options)
    wants_lse = _wants_lse(return_lse, return_aux)
    recorded = record(meaning_of(block_mask), score_mod, query.device)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    out, lse = _attend((query, key, value), recorded, factor, wants_lse)
    if return_aux is not None:
        return out, AuxOutput(lse=lse)
    return (out, lse) if return_lse else out


def _attend(
    operands: tuple[Tensor, Tensor, Tensor], recorded: Recorded, scale: float, wants_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Output, and log-sum-exp if it is wanted."""
    query, key, _ = operands
    lengths = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
    known = all([has_static_value(length) for length in lengths])
    text, tables, learned, n_sizes = _planned(recorded.text, lengths if known else None)
    read = [
        given(recorded.tensors[number], dtype, query.device)
        for number, dtype in (*tables, *learned)
    ]
    sizes = recorded.sizes[:n_sizes]
    if wants_lse:
        return attend_with_lse(operands, text, scale, read, sizes=sizes)
    return attend(operands, text, scale, read, sizes=sizes), None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _planned(
    text: str, lengths: tuple[int, int, int, int] | None
) -> tuple[str, tuple[_Read, ...], tuple[_Read, ...], int]:
    """The text of a :class:`NamedMask`, what it reads, and how many sizes."""
    program = program_of(text, lengths)
    named = NamedMask(NamedPart(program.mask, GIVEN), score=program.score)
    tables = tuple(zip(program.tables, program.mask.tables, strict=True))
    names = () if program.score is None else program.score.learned
    learned = tuple(zip(program.learned, names, strict=True))
    return named.text, tables, learned, program.mask.n_sizes


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: TorchBlockMask | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor]:
    """Keys and values with a batch entry for each of the queries.

    Raises:
        BadShape, BadPattern, UnsupportedDtype, PatternMisuse: something does not fit.
    """
    if block_mask is not None and not isinstance(block_mask, TorchBlockMask):
        raise PatternMisuse(
            f"sparse_compile: flex_attention() got a block_mask of type "
            f"{type(block_mask).__name__}. Make it with create_block_mask(mask_mod, B, H, Q_LEN, "
            "KV_LEN)."
        )
    if query.dim() == key.dim() == value.dim() == 4:
        if not enable_gqa and query.shape[1] != key.shape[1]:
            raise BadShape(
                f"sparse_compile: flex_attention() got Hq={query.shape[1]} and "
                f"Hkv={key.shape[1]}. Write enable_gqa=True for grouped queries."
            )
        if query.shape[0] != key.shape[0] == 1 and key.shape[0] == value.shape[0]:
            batch = query.shape[0]
            key, value = (x.expand(batch, -1, -1, -1) for x in (key, value))
    if not query.device == key.device == value.device:
        raise BadShape(
            f"sparse_compile: flex_attention() got q on {query.device}, k on {key.device} and v "
            f"on {value.device}. Move them to one device."
        )
    check_operands(query, key, value)
    if block_mask is not None:
        _check_mask(query, key, block_mask)
    return key, value


def _check_mask(query: Tensor, key: Tensor, mask: TorchBlockMask) -> None:
    lengths, made_for = (query.shape[2], key.shape[2]), (mask.shape[-2], mask.shape[-1])
    if lengths != made_for and not _is_empty(mask):
        shorter = lengths[0] <= made_for[0] and lengths[1] <= made_for[1]
        instead = "Make one for these lengths with create_block_mask"
        if shorter:
            instead += (
                f", or crop this one with block_mask._adjust{lengths}, which keeps its upper left "
                "corner"
            )
        raise BadPattern(
            f"sparse_compile: block_mask was made for shape {tuple(mask.shape)}, but q has "
            f"{lengths[0]} tokens and k {lengths[1]}. {instead}."
        )
    sizes = zip(("batch", "heads"), mask.shape[-4:-2], query.shape, strict=False)
    for name, own, wanted in sizes:
        if wanted % own:
            raise BadPattern(
                f"sparse_compile: block_mask was made for shape {tuple(mask.shape)}, but q has "
                f"{list(query.shape)}: its {name} must be 1 or {wanted}."
            )
    device = mask.device if isinstance(mask, BlockMask) else mask.kv_num_blocks.device
    if query.device != device:
        raise BadShape(
            f"sparse_compile: block_mask is on {device}, and q on {query.device}. Write "
            f"block_mask.to({str(query.device)!r})."
        )


def _is_empty(mask: TorchBlockMask) -> bool:
    """Whether it is the mask of torch that stands for none, which fits all lengths."""
    return min(mask.BLOCK_SIZE) >= 1 << 30


def _wants_lse(return_lse: bool, return_aux: AuxRequest | None) -> bool:
    if return_aux is None:
        return return_lse
    if return_lse:
        raise PatternMisuse(
            "sparse_compile: flex_attention() got return_lse=True and return_aux. Write "
            "return_aux=AuxRequest(lse=True) alone."
        )
    if return_aux.max_scores:
        raise WeightsNeeded(
            "sparse_compile: flex_attention() got return_aux=AuxRequest(max_scores=True), but its "
            "scores are never made. Ask for lse=True alone, or call "
            "torch.nn.attention.flex_attention.flex_attention."
        )
    return bool(return_aux.lse)


_NOTED: set[str] = set()


def _note_options(options: Mapping[str, Any] | None) -> None:
    """Say once that options for the kernels of torch do nothing here."""
    if not options or torch.compiler.is_compiling() or _NOTED:
        return
    _NOTED.update(options)
    warnings.warn(
        f"sparse_compile: kernel_options {sorted(options)} are for the kernels of torch's "
        "flex_attention and have no effect on this library's.",
        stacklevel=3,
    )

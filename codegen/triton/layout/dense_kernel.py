"""One pass over a dense mask on a GPU: its bits, and what each block holds.

Imported only where the mask is on a GPU, so that nothing else needs Triton.
"""

# Triton reads the annotations of a kernel, and knows none for pointers and numbers.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.codegen.entry import Entry, Kernel, constants, integers, pointers
from sparse_compile.codegen.runtime.launch import Launcher, launchers_of

#: Keys and queries that a program reads at once, and its warps: enough loads in flight to use the
#: whole bandwidth, few enough registers for many programs on a multiprocessor.
STRIP, ROWS, WARPS = 1024, 4, 4


@triton.jit
def read_mask(
    MASK,
    WORDS,
    KINDS,
    BIASED,
    n_q,
    n_kv,
    heads,
    stride_b,
    stride_h,
    stride_q,
    stride_kv,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    READ_Q: tl.constexpr,
    READ_KV: tl.constexpr,
    ADDITIVE: tl.constexpr,
    FOURS: tl.constexpr,
):
    """Read the rows of one row of blocks, READ_KV keys wide.

    ``WORDS`` is int32 [classes, n_q, ceil(n_kv / 32)], ``KINDS`` int8 [classes, block rows, block
    columns] and ``BIASED`` one int32, 0 at the start. With FOURS the mask is an int32 view of bools
    and its strides count int32s; otherwise it is uint8, or floating if ADDITIVE.
    """
    strips, n_words = tl.cdiv(n_kv, READ_KV), tl.cdiv(n_kv, 32)
    block_rows, block_cols = tl.cdiv(n_q, BLOCK_Q), tl.cdiv(n_kv, BLOCK_KV)
    program = tl.program_id(0)
    strip, block_row = program % strips, (program // strips) % block_rows
    c = (program // (strips * block_rows)).to(tl.int64)
    MASK += (c // heads) * stride_b + (c % heads) * stride_h
    WORDS += c * n_q * n_words
    KINDS += (c * block_rows + block_row) * block_cols

    word = strip * (READ_KV // 32) + tl.arange(0, READ_KV // 32)
    some = tl.zeros([READ_Q, READ_KV // 32], tl.int32)
    every = tl.full([READ_Q, READ_KV // 32], -1, tl.int32)
    biased = tl.zeros([READ_Q, READ_KV // 32], tl.int32)
    for first in range(0, BLOCK_Q, READ_Q):
        q = block_row * BLOCK_Q + first + tl.arange(0, READ_Q)
        here = (q < n_q)[:, None]
        row = MASK + q.to(tl.int64)[:, None] * stride_q
        if FOURS:
            words = words_of_fours(row, here, strip, n_kv, READ_Q, READ_KV)
        else:
            words, strange = words_of_entries(
                row, here, strip, n_kv, stride_kv, READ_Q, READ_KV, ADDITIVE
            )
            biased |= strange
        to = WORDS + q.to(tl.int64)[:, None] * n_words + word[None, :]
        tl.store(to, words, here & (word < n_words)[None, :])
        some |= words
        # Nothing beyond the end has a bit, so a block that sticks out is not FULL.
        every &= words

    store_kinds(KINDS, some, every, strip, block_cols, BLOCK_KV, READ_KV)
    if ADDITIVE:
        found = tl.max(tl.max(biased, 1), 0)
        tl.store(BIASED, found, found != 0)


@triton.jit
def words_of_fours(row, here, strip, n_kv, READ_Q: tl.constexpr, READ_KV: tl.constexpr):
    """Bits of bools, four of which are read at a time; int32 [READ_Q, READ_KV / 32]."""
    at = strip * (READ_KV // 4) + tl.arange(0, READ_KV // 4)
    four = tl.load(row + at[None, :], here & (at < n_kv // 4)[None, :], 0)
    four = four.to(tl.uint32, bitcast=True)
    # Adding 0x7f carries into bit 7 of each byte that is not zero; the product moves bits 7, 15, 23
    # and 31 next to each other, into the top four.
    four = (((four & 0x7F7F7F7F) + 0x7F7F7F7F) | four) & 0x80808080
    bits = tl.reshape((four * 0x00204081) >> 28, [READ_Q, READ_KV // 32, 8])
    bits = bits << (tl.arange(0, 8) * 4).to(tl.uint32)[None, None, :]
    return tl.sum(bits, 2).to(tl.int32, bitcast=True)


@triton.jit
def words_of_entries(
    row,
    here,
    strip,
    n_kv,
    stride_kv,
    READ_Q: tl.constexpr,
    READ_KV: tl.constexpr,
    ADDITIVE: tl.constexpr,
):
    """Bits of the entries, and not 0 where one of them is a bias; int32 [READ_Q, READ_KV / 32]."""
    at = strip * READ_KV + tl.arange(0, READ_KV)
    entries = row + at.to(tl.int64)[None, :] * stride_kv
    inside = here & (at < n_kv)[None, :]
    strange = tl.zeros([READ_Q, READ_KV // 32], tl.int32)
    if ADDITIVE:
        value = tl.load(entries, inside, float("-inf"))
        keep = value != float("-inf")
        odd = (keep & (value != 0)).to(tl.int32)
        strange = tl.max(tl.reshape(odd, [READ_Q, READ_KV // 32, 32]), 2)
    else:
        keep = tl.load(entries, inside, 0) != 0
    bits = tl.reshape(keep.to(tl.uint32), [READ_Q, READ_KV // 32, 32])
    bits = bits << tl.arange(0, 32).to(tl.uint32)[None, None, :]
    return tl.sum(bits, 2).to(tl.int32, bitcast=True), strange


@triton.jit
def store_kinds(
    KINDS, some, every, strip, block_cols, BLOCK_KV: tl.constexpr, READ_KV: tl.constexpr
):
    """EMPTY, PARTIAL or FULL of each block, from the bits set in some and in every row."""
    some, every = tl.max((some != 0).to(tl.int32), 0), tl.min((every == -1).to(tl.int32), 0)
    some = tl.max(tl.reshape(some, [READ_KV // BLOCK_KV, BLOCK_KV // 32]), 1)
    every = tl.min(tl.reshape(every, [READ_KV // BLOCK_KV, BLOCK_KV // 32]), 1)
    col = strip * (READ_KV // BLOCK_KV) + tl.arange(0, READ_KV // BLOCK_KV)
    # EMPTY, PARTIAL and FULL are 0, 1 and 2.
    tl.store(KINDS + col, (some + every).to(tl.int8), col < block_cols)


def read_kernel(dtype: str, fours: bool) -> Kernel:
    """The kernel for masks of a dtype, or of bools of which it reads four at a time."""
    additive = dtype not in ("int32", "uint8")
    lines = (
        pointers(dtype, "MASK") + pointers("int32", "WORDS") + pointers("int8", "KINDS"),
        pointers("int32", "BIASED"),
        integers("n_q", "n_kv") + integers("heads", assumed=None),
        integers("stride_b", "stride_h", "stride_q") + integers("stride_kv", assumed=1),
        *constants(BLOCK_Q=128, BLOCK_KV=128, READ_Q=ROWS, READ_KV=STRIP),
        *constants(ADDITIVE=additive, FOURS=fours),
    )
    entry = Entry("read_mask", lines, {"num_warps": WARPS, "enable_fp_fusion": True})
    return Kernel(__name__, "", (entry,), {"read_mask": read_mask})


@functools.lru_cache(maxsize=16)
def _launcher(dtype: str, fours: bool) -> Launcher:
    return launchers_of(read_kernel(dtype, fours))["read_mask"]


def supports(block_q: int, block_kv: int) -> bool:
    """Whether the kernel has this block shape: powers of two, whole words of 32 keys."""
    powers = all(block & (block - 1) == 0 for block in (block_q, block_kv))
    return powers and block_kv >= 32


def read_dense(mask: Tensor, block_q: int, block_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(words, kinds, biased)`` of a mask [batches, heads, n_q, n_kv], as the kernel writes them.

    Args:
        mask: bool or floating, any strides, with at least one query and one key.
        block_q: queries per block, see :func:`supports`.
        block_kv: keys per block.
    """
    batches, heads, n_q, n_kv = mask.shape
    classes, rows, cols = batches * heads, -(-n_q // block_q), -(-n_kv // block_kv)
    device = mask.device
    words = torch.empty(classes, n_q, -(-n_kv // 32), dtype=torch.int32, device=device)
    kinds = torch.empty(classes, rows, cols, dtype=torch.int8, device=device)
    biased = torch.zeros(1, dtype=torch.int32, device=device)
    read_q, read_kv = min(ROWS, block_q), max(STRIP, block_kv)
    fours = _in_fours(mask)
    if mask.dtype == torch.bool:
        mask = mask.view(torch.int32 if fours else torch.uint8)
    programs = classes * rows * -(-n_kv // read_kv)
    values = {"MASK": mask, "WORDS": words, "KINDS": kinds, "BIASED": biased, "heads": heads}
    names = ("stride_b", "stride_h", "stride_q", "stride_kv")
    values |= dict(zip(names, mask.stride(), strict=True))
    values |= {"n_q": n_q, "n_kv": n_kv, "BLOCK_Q": block_q, "BLOCK_KV": block_kv}
    values |= {"READ_Q": read_q, "READ_KV": read_kv, "FOURS": fours}
    dtype = str(mask.dtype).removeprefix("torch.")
    _launcher(dtype, fours)((programs,), {**values, "ADDITIVE": mask.is_floating_point()})
    return words, kinds, biased


def _in_fours(mask: Tensor) -> bool:
    """Whether four bools in a row are one int32 everywhere."""
    *outer, inner = mask.stride()
    whole = all(stride % 4 == 0 for stride in (*outer, mask.shape[-1], mask.storage_offset()))
    return mask.dtype == torch.bool and inner == 1 and whole and mask.data_ptr() % 4 == 0

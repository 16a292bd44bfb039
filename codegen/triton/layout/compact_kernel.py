"""From what each block holds to lists of blocks, on a GPU, in two launches for both directions.

Imported only where the blocks are on a GPU, so that nothing else needs Triton.
"""

# Triton reads the annotations of a kernel, and knows none for pointers and numbers.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.codegen.entry import Entry, Kernel, constants, integers, pointers
from sparse_compile.codegen.runtime.launch import launchers_of
from sparse_compile.codegen.triton.layout.build import visited, with_room
from sparse_compile.layout.block_layout import BlockLists

#: Blocks of a line that a program looks at together.
CHUNK = 512


@triton.jit
def line_of(KINDS, number, rows, cols):
    """A row of [classes, rows, cols], or after all rows a column: start, stride and length."""
    is_row = number < rows
    first = tl.program_id(1).to(tl.int64) * rows * cols
    first += tl.where(is_row, number * cols, number - rows)
    return KINDS + first, tl.where(is_row, 1, cols), tl.where(is_row, cols, rows)


@triton.jit
def count_blocks(KINDS, COUNTS, rows, cols, CHUNK: tl.constexpr):
    """COUNTS, int32 [classes, rows + cols, 2]: PARTIAL and FULL blocks of each line."""
    number = tl.program_id(0)
    at, stride, length = line_of(KINDS, number, rows, cols)
    partial, full = tl.zeros([CHUNK], tl.int32), tl.zeros([CHUNK], tl.int32)
    for first in range(0, length, CHUNK):
        block = first + tl.arange(0, CHUNK)
        kind = tl.load(at + block.to(tl.int64) * stride, mask=block < length, other=0)
        partial += (kind == 1).to(tl.int32)
        full += (kind == 2).to(tl.int32)
    to = COUNTS + (tl.program_id(1).to(tl.int64) * (rows + cols) + number) * 2
    tl.store(to, tl.sum(partial, 0))
    tl.store(to + 1, tl.sum(full, 0))


@triton.jit
def list_blocks(
    KINDS, COUNTS, STARTS, ROWS, COLS, rows, cols, row_room, col_room, CHUNK: tl.constexpr
):
    """The index of each line, PARTIAL blocks first.

    STARTS is int32 [rows + cols], where each line begins in its direction; ROWS is int32 [classes,
    row_room], COLS int32 [classes, col_room].
    """
    number, c = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at, stride, length = line_of(KINDS, number, rows, cols)
    if number < rows:
        to = ROWS + c * row_room
    else:
        to = COLS + c * col_room
    to += tl.load(STARTS + number)
    partial, full = 0, tl.load(COUNTS + (c * (rows + cols) + number) * 2)
    for first in range(0, length, CHUNK):
        block = first + tl.arange(0, CHUNK)
        kind = tl.load(at + block.to(tl.int64) * stride, mask=block < length, other=0)
        here = (kind == 1).to(tl.int32)
        tl.store(to + (partial - 1 + tl.cumsum(here, 0)), block, mask=here != 0)
        partial += tl.sum(here, 0)
        here = (kind == 2).to(tl.int32)
        tl.store(to + (full - 1 + tl.cumsum(here, 0)), block, mask=here != 0)
        full += tl.sum(here, 0)


_KINDS, _CHUNK = pointers("int8", "KINDS"), constants(CHUNK=CHUNK)
_SHAPE = integers("rows", "cols", assumed=None)
_COUNTED = _KINDS, pointers("int32", "COUNTS"), _SHAPE, *_CHUNK
_LISTED = (
    _KINDS + pointers("int32", "COUNTS", "STARTS", "ROWS", "COLS"),
    _SHAPE + integers("row_room", "col_room", assumed=None),
    *_CHUNK,
)
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
COMPACT = Kernel(
    __name__,
    "",
    (Entry("count_blocks", _COUNTED, _OPTIONS), Entry("list_blocks", _LISTED, _OPTIONS)),
    {"count_blocks": count_blocks, "list_blocks": list_blocks},
)
_LAUNCH = launchers_of(COMPACT)


def compacted(kinds: Tensor, flag: Tensor) -> tuple[BlockLists, BlockLists, bool]:
    """The lists of rows and of columns; and whether ``flag`` is set, read at the same time.

    Waits for the device once.

    Args:
        kinds: int8 [classes, rows, cols] of EMPTY, PARTIAL and FULL, contiguous.
        flag: int32 [1] on the same device.
    """
    (classes, rows, cols), device = kinds.shape, kinds.device
    counts = torch.empty(classes, rows + cols, 2, dtype=torch.int32, device=device)
    grid = rows + cols, classes
    values = {"KINDS": kinds, "COUNTS": counts, "rows": rows, "cols": cols, "CHUNK": CHUNK}
    _LAUNCH["count_blocks"](grid, values)
    *known, is_set = torch.split(torch.cat([visited(counts), flag]).cpu(), [rows, cols, 1])
    row_lists, col_lists = (
        with_room(part.contiguous(), most)
        for part, most in zip(torch.split(counts, [rows, cols], 1), known, strict=True)
    )
    values["STARTS"] = torch.cat([row_lists.start[:-1], col_lists.start[:-1]])
    for side, lists in (("row", row_lists), ("col", col_lists)):
        values |= {f"{side.upper()}S": lists.index, f"{side}_room": lists.index.shape[1]}
    _LAUNCH["list_blocks"](grid, values)
    return row_lists, col_lists, bool(is_set)

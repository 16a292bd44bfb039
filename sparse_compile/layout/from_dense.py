"""Masks that arrive as dense tensors: their layout and their bits, in one pass over the mask.

A predicate reads such a mask through a table of bits, as a :class:`DenseRead` says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import TypeVar

import sympy
import torch
from torch import Tensor

from sparse_compile.errors import BadPattern
from sparse_compile.expr import WORD, MaskExpr, dense_bit
from sparse_compile.layout.block_layout import BlockGrid, BlockLayout, BlockLists, VisitedBlocks
from sparse_compile.layout.builders import BUILDERS
from sparse_compile.layout.layout import Layout, build_views
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.layout.tensor_state import memory_of
from sparse_compile.spec import AttentionSpec, EmptyRows
from sparse_compile.spec.json_text import tuples
from sparse_compile.spec.view import natural

#: The CPU reads bands of about this many entries, to bound the temporaries.
_ENTRIES_AT_ONCE = 1 << 24
#: Times eight bools in an int64, shifted down by 56: the eight bits, first bool lowest.
_GATHER_EIGHT = 0x0102040810204080
_ORDER = ("b", "h", "q", "kv")

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class DenseBlocks:
    """What :func:`dense_layout` finds out about a mask; holds no reference to it.

    >>> print(dense_layout(torch.ones(2, 1, 4, 4, dtype=torch.bool), 16, 16).expr)
    Ne(Bit(t0(b, 0, q, FloorDiv(kv, 32)), FloorMod(kv, 32)), 0)

    Attributes:
        layout: the visited blocks; a PARTIAL block attends somewhere and not everywhere.
        words: int32 [classes, n_q, ceil(n_kv / 32)]: bit ``i`` of word ``w`` is key ``32 * w + i``.
        biased: whether an additive mask holds something other than 0 and -inf.
    """

    layout: BlockLayout
    words: Tensor
    biased: bool

    @property
    def table(self) -> Tensor:
        """The words by batch entry and head, [1 or batch, 1 or heads, n_q, ceil(n_kv / 32)]."""
        return self.words.view(self.layout.batches, self.layout.heads, *self.words.shape[1:])

    @property
    def expr(self) -> MaskExpr:
        """The mask as a predicate that reads :attr:`table`."""
        axes = ["b"] * (self.layout.batches > 1) + ["h"] * (self.layout.heads > 1) + ["q", "kv"]
        return MaskExpr(sympy.Ne(dense_bit(0, axes), 0), ("int32",))

    def check(self) -> None:
        """Raise if the tensor is a bias: whether a pair attends is all that a layout can say."""
        if self.biased:
            raise BadPattern(
                "sparse_compile: this attention mask is a bias: it holds values other than 0 and "
                "-inf, which change scores and cannot become a block layout. Pass a bool mask, "
                "such as mask > -1e4 where very negative values mean 'do not attend'."
            )


def dense_layout(mask: Tensor, block_q: int, block_kv: int) -> DenseBlocks:
    """Read a dense mask once, on its device, and find its blocks.

    Waits for the device once, for the number of visited blocks.

    Args:
        mask: [n_q, n_kv], with up to two dimensions for heads and batch in front, 1 where all share
            it. Bool: True attends. Floating: added to the scores, 0 attends and -inf does not; what
            else it may hold, :meth:`DenseBlocks.check` reports; the layout counts it as attending.
            Any strides; a dimension expanded by ``expand`` is read once.
        block_q: queries per block.
        block_kv: keys per block.

    >>> causal = torch.ones(48, 48, dtype=torch.bool).tril()
    >>> dense_layout(causal, 16, 16).layout.kinds().tolist()
    [[[1, 0, 0], [2, 1, 0], [2, 2, 1]]]
    """
    mask = _four_dimensional(mask)
    batches, heads, n_q, n_kv = mask.shape
    cut = BlockGrid(n_q, n_kv, natural(block_q), natural(block_kv), batches, heads)
    builder = BUILDERS.get(mask.device)
    read = builder.read_dense(mask, block_q, block_kv) if builder and mask.numel() else None
    words, kinds, biased = read or read_dense_in_torch(mask, block_q, block_kv)
    if builder is not None and kinds.numel():
        rows, cols, is_biased = builder.compacted(kinds, biased)
    else:
        classes, q, kv = kinds.nonzero().unbind(1)
        visited = VisitedBlocks(classes, q, kv, kinds[classes, q, kv])
        (rows, cols), is_biased = visited.lists(cut.classes, cut.grid), bool(biased)
    return DenseBlocks(cut.layout(rows, cols), words, is_biased)


def remembered(mask: Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` found out about a tensor whose values the user promised to leave alone.

    Made again when its memory is freed or a modification is counted.

    Args:
        mask: the tensor.
        key: tells what ``make`` makes from anything else about the tensor.
        make: makes it; the result must not refer to the tensor.
    """
    known = memory_of(mask)
    if key not in known:
        known[key] = make()
    found: T = known[key]
    return found


def _four_dimensional(mask: Tensor) -> Tensor:
    """The mask [1 or batch, 1 or heads, n_q, n_kv]; an expanded dimension has size 1, too."""
    if not 2 <= mask.dim() <= 4:
        raise BadPattern(
            f"sparse_compile: a dense mask of shape {tuple(mask.shape)} has {mask.dim()} "
            "dimensions. Write [n_q, n_kv], or [batch or 1, heads or 1, n_q, n_kv]."
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise BadPattern(
            f"sparse_compile: a dense mask of {mask.dtype} is ambiguous. Write mask.bool() if "
            "non-zero means attend, or a floating mask of 0 and -inf to be added."
        )
    mask = mask.detach()
    mask = mask[(None,) * (4 - mask.dim())]
    for dim in (0, 1):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def read_dense_in_torch(mask: Tensor, block_q: int, block_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a kernel that reads dense masks returns, for any device."""
    batches, heads, n_q, n_kv = mask.shape
    classes, cols = batches * heads, -(-n_kv // block_kv)
    band = max(1, _ENTRIES_AT_ONCE // max(1, classes * n_kv * block_q)) * block_q
    words, kinds = [], []
    biased = torch.zeros(1, dtype=torch.int32, device=mask.device)
    for part in torch.split(mask, band, dim=2) if mask.numel() else ():
        # What a bias holds attends.
        attends = part if part.dtype == torch.bool else part != float("-inf")
        attends = attends.flatten(0, 1)
        words.append(_packed(attends))
        if block_kv % WORD:
            kinds.append(_kinds(attends, attends, block_q, block_kv))
        else:
            # Nothing beyond the end has a bit, so a block that sticks out is not FULL.
            some, every = words[-1] != 0, words[-1] == -1
            kinds.append(_kinds(some, every, block_q, block_kv // WORD))
        if mask.is_floating_point():
            biased += (attends & (part != 0).flatten(0, 1)).any()
    if not words:
        rows = -(-n_q // block_q)
        words = [torch.zeros(classes, n_q, -(-n_kv // WORD), dtype=torch.int32, device=mask.device)]
        kinds = [torch.zeros(classes, rows, cols, dtype=torch.int8, device=mask.device)]
    return torch.cat(words, 1), torch.cat(kinds, 1), biased


def _packed(attends: Tensor) -> Tensor:
    """Bool [classes, n, n_kv] as int32 words [classes, n, ceil(n_kv / 32)]."""
    # A bool that came from elsewhere may be any byte that is not zero.
    ones = (attends.view(torch.uint8) != 0).view(torch.uint8)
    padded = torch.nn.functional.pad(ones, (0, -ones.shape[-1] % WORD))
    eights = padded.contiguous().view(torch.int64)
    return ((eights * _GATHER_EIGHT) >> 56).to(torch.uint8).view(torch.int32)


def _kinds(some: Tensor, every: Tensor, block_q: int, width: int) -> Tensor:
    """EMPTY, PARTIAL or FULL of each block, int8 [classes, rows, cols].

    Args:
        some, every: bool [classes, n_q, n]: where something and where everything attends.
        block_q: queries per block.
        width: entries of these per block, along the keys.
    """
    # EMPTY, PARTIAL and FULL are 0, 1 and 2.
    reached = _tiles(some, block_q, width).any(-1).any(2).to(torch.int8)
    return reached.add_(_tiles(every, block_q, width).all(-1).all(2))


def _tiles(values: Tensor, block_q: int, width: int) -> Tensor:
    """[classes, rows, block_q, cols, width], with False for what does not exist."""
    classes, n_q, n = values.shape
    padded = torch.nn.functional.pad(values, (0, -n % width, 0, -n_q % block_q))
    return padded.reshape(classes, -(-n_q // block_q), block_q, -(-n // width), width)


@dataclass(frozen=True)
class DenseRead:
    """How a predicate reads a mask tensor through a table of bits.

    Attributes:
        table: the number of the table.
        axes: what each axis of the tensor is: ``"b"``, ``"h"``, ``"q"`` or ``"kv"``, or ``""`` for
            one of size one that it does not depend on.
        remember: whether to reuse what was found: only where the user says that the tensor, which
            comes from outside, is stable. Modifications that are counted are found all the same.

    >>> reads = (DenseRead(1, ("", "", "q", "kv"), True),)
    >>> DenseRead.parse(DenseRead.text(reads)) == reads
    True
    """

    table: int
    axes: tuple[str, ...]
    remember: bool = False

    @staticmethod
    def text(reads: Sequence[DenseRead]) -> str:
        """What :meth:`parse` reads; an argument of an operator."""
        return json.dumps([astuple(read) for read in reads])

    @staticmethod
    def parse(text: str) -> tuple[DenseRead, ...]:
        """The reads that :meth:`text` spelled."""
        return tuple(DenseRead(*tuples(fields)) for fields in json.loads(text))

    @property
    def bit(self) -> sympy.Expr:
        """Whether a pair attends, 0 or 1."""
        return dense_bit(self.table, self.axes)

    def view(self, mask: Tensor, n_q: int, n_kv: int) -> Tensor:
        """The mask as [1 or batch, 1 or heads, 1 or n_q, 1 or n_kv]; a view.

        >>> DenseRead(0, ("kv", "", "b"), True).view(torch.ones(9, 1, 2), 4, 8).shape
        torch.Size([2, 1, 1, 8])
        """
        present = [at for at, name in enumerate(self.axes) if name]
        names = [self.axes[at] for at in present]
        mask = mask.detach().squeeze([at for at, name in enumerate(self.axes) if not name])
        mask = mask.permute([names.index(name) for name in _ORDER if name in names])
        for at, name in enumerate(_ORDER):
            if name not in names:
                mask = mask.unsqueeze(at)
        for at, length in ((2, n_q), (3, n_kv)):
            # Rows beyond the lengths are never read, as in mask[:, :, :n] of a longer buffer.
            if mask.shape[at] > length:
                mask = mask.narrow(at, 0, length)
        return mask

    def found(self, mask: Tensor, spec: AttentionSpec, n_q: int, n_kv: int) -> DenseBlocks:
        """The bits of the mask, and its blocks.

        Raises:
            BadPattern: the mask is floating, and not all of it is 0 or -inf.
        """
        view = self.view(mask, n_q, n_kv)
        shape = spec.block_q, spec.block_kv

        def read() -> DenseBlocks:
            return dense_layout(view, *shape)

        found = remembered(mask, (self.axes, n_q, n_kv, shape), read) if self.remember else read()
        found.check()
        return found


#: The text of none; torch.compile cannot trace how a text is made.
NO_READS = DenseRead.text([])


@dataclass(frozen=True)
class DenseCall:
    """A call of an attention whose mask reads mask tensors.

    Attributes:
        spec: what is computed.
        reads: which tables are mask tensors.
        tables: what the mask reads; for ``reads`` the mask tensors.
        sizes: the integers that it reads.
        shape: of the problem.
        device: where the layout will be used.
    """

    spec: AttentionSpec
    reads: tuple[DenseRead, ...]
    tables: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    shape: ProblemShape
    device: torch.device

    def run(self) -> tuple[list[Tensor], Layout | None]:
        """The words of each of ``reads``, in new memory; and the layout, if blocks cover the mask.

        What compiles a graph may reuse the memory of the words for other tensors.
        """
        lengths = self.shape.n_q, self.shape.n_kv
        found = {
            read.table: read.found(self.tables[read.table], self.spec, *lengths)
            for read in self.reads
        }
        words = [found[read.table].table.to(self.device, copy=read.remember) for read in self.reads]
        read = self.reads[0]
        if not self.spec.parts:
            return words, None
        if len(self.tables) > 1 or not read.remember:
            return words, self._layout(words, found)
        # The layout follows from one mask tensor alone.
        spec = replace(self.spec, where=(), empty_rows=EmptyRows.ZERO)
        key = spec, self.shape, self.sizes
        mask = self.tables[read.table]
        return words, remembered(mask, key, lambda: self._layout(words, found))

    def _layout(self, words: Sequence[Tensor], found: dict[int, DenseBlocks]) -> Layout:
        """The layout without its tables, so that it refers to no mask tensor."""
        views = tuple(view.to(self.device) for view in self._views(words, found))
        return Layout(self.spec, views, self.shape.batch, self.shape.heads, sizes=self.sizes)

    def _views(
        self, words: Sequence[Tensor], found: dict[int, DenseBlocks]
    ) -> tuple[BlockLayout, ...]:
        read = self.reads[0]
        whole = self.spec.mask.predicate == sympy.Ne(read.bit, 0)
        if whole and not self.spec.coverage and {"q", "kv"} <= set(read.axes):
            # The pass over the mask has listed just the blocks that it visits.
            batches = self.shape.batch if "b" in read.axes else 1
            heads = self.shape.heads if "h" in read.axes else 1
            return (_for_classes(found[read.table].layout, batches, heads),)
        tables = list(self.tables)
        for read, own in zip(self.reads, words, strict=True):
            tables[read.table] = own
        return build_views(self.spec, self.shape, tables, self.sizes, self.device).views


def words_of(mask: Tensor, read: DenseRead, n_q: int, n_kv: int) -> Tensor:
    """The table of a mask tensor, without a layout."""
    return dense_layout(read.view(mask, n_q, n_kv), 128, 128).table


def _for_classes(layout: BlockLayout, batches: int, heads: int) -> BlockLayout:
    """The layout with the lists of each class that a problem has, where several share some.

    A mask made by ``expand`` is read once, and has fewer classes than its shape says.
    """
    if (layout.batches, layout.heads) == (batches, heads):
        return layout
    device = layout.rows.start.device
    b, h = torch.arange(batches, device=device), torch.arange(heads, device=device)
    b, h = b.clamp(max=layout.batches - 1), h.clamp(max=layout.heads - 1)
    of = (b[:, None] * layout.heads + h).flatten()
    rows, cols = (
        BlockLists(lists.start, lists.counts[of], lists.index[of], lists.load)
        for lists in (layout.rows, layout.cols)
    )
    return replace(layout, batches=batches, heads=heads, rows=rows, columns=cols)

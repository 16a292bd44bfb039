"""Tables of bits: mask tensors that a predicate reads, and the layout that follows from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import sympy
import torch
from torch import Tensor

from sparse_compile.expr import dense_bit
from sparse_compile.layout.block_layout import BlockLayout, BlockLists
from sparse_compile.layout.from_dense import DenseBlocks, dense_layout, remembered
from sparse_compile.layout.layout import Layout, build_views
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.spec import AttentionSpec, EmptyRows
from sparse_compile.spec.json_text import tuples

_ORDER = ("b", "h", "q", "kv")


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

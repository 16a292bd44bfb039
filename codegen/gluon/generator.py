"""The generator of forwards in Gluon for Hopper; backwards and merges are Triton's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_compile.codegen.entry import Kernel
from sparse_compile.codegen.generators import ShapeNeed
from sparse_compile.codegen.gluon.entries import TILES, shape_of
from sparse_compile.codegen.gluon.source import gluon_kernel
from sparse_compile.codegen.triton.blocks.tiles import tiles_for
from sparse_compile.codegen.triton.predicate import print_predicate
from sparse_compile.layout.views.terms import periods
from sparse_compile.spec import AttentionSpec, KernelSpec
from sparse_compile.spec.block_shape import GPU_SHAPES, BlockShape

#: What a pair costs in its blocks, times that in the Triton kernel's of 64 x 64; and where a
#: backward, which costs as much in these as in those, is two and a half times the forward.
_PAIR, _TRAINED = 0.8, 0.94
#: Fewer queries may leave too much of their last block empty.
_FEWEST = 1024


class _Gluon:
    """See :class:`sparse_compile.codegen.generators.Generator`."""

    name = "gluon"

    def refusal(self, spec: Any) -> str:
        """Why not; empty if it can."""
        if not isinstance(spec, KernelSpec):
            return f"it knows no {type(spec).__name__}"
        return _of_machine(spec) or _of_blocks(spec) or _of_mask(spec.attention)

    def block_shapes(self, need: ShapeNeed) -> tuple[BlockShape, ...]:
        """Its blocks, and those of Triton for masks that visit much less with them.

        None where it would refuse what is asked for, or where another order of tokens may be
        chosen: its kernels know the plain one.
        """
        attention, blocks = need.attention, shape_of(need.head_dim)
        if attention is None or blocks is None or not _fills(need, blocks[0]):
            return ()
        if periods(attention.mask.predicate):
            return ()
        whole = replace(attention.of_blocks, block_q=blocks[0], block_kv=blocks[1])
        dims = need.head_dim, need.value_dim
        refusal = self.refusal(KernelSpec(whole, *dims, need.dtype, need.target.arch))
        cost = _TRAINED if need.trained else _PAIR
        return () if refusal else (BlockShape(*blocks, cost), *GPU_SHAPES)

    def generate(self, spec: Any) -> Kernel:
        """The kernels of a spec."""
        return gluon_kernel(spec)


GLUON = _Gluon()


def _fills(need: ShapeNeed, block_q: int) -> bool:
    """Whether there are blocks of queries for all multiprocessors."""
    if need.shape is None or need.shape.n_q < _FEWEST:
        return False
    batch, heads, n_q, _ = need.shape
    return batch * heads * (n_q // block_q) >= need.target.workers


def _of_machine(spec: KernelSpec) -> str:
    if spec.arch != "sm_90":
        return "its kernels are for Hopper, sm_90"
    if spec.dtype not in ("bfloat16", "float16"):
        return f"its kernels multiply bfloat16 and float16, not {spec.dtype}"
    if spec.head_dim != spec.value_dim or spec.head_dim not in TILES:
        dims = " or ".join(map(str, TILES))
        return f"its heads are {dims} features wide, not {spec.head_dim} and {spec.value_dim}"
    return ""


def _of_blocks(spec: KernelSpec) -> str:
    attention, shape = spec.attention, shape_of(spec.head_dim)
    if len(attention.parts) != 1 or not attention.parts[0].is_natural:
        return "it goes through blocks of one view, in plain order"
    if attention.parts[0].listed:
        return "blocks that a selection lists are the Triton kernel's"
    if (attention.block_q, attention.block_kv) != shape:
        found = f"{attention.block_q} x {attention.block_kv}"
        return f"its blocks are {' x '.join(map(str, shape or ()))}, not {found}"
    # What one warpgroup leaves of a split line is what merge_forward takes.
    return "" if tiles_for(spec).forward.m == TILES[spec.head_dim].m else "tiles do not fit"


def _of_mask(attention: AttentionSpec) -> str:
    if attention.score is not None:
        return "it has no score programs"
    if attention.dropout is not None:
        return "it drops no weights"
    if attention.mask.lookups:
        return "its masks look nothing up"
    helpers = print_predicate(attention.part_mask(attention.parts[0]), "kv").helpers
    return f"its masks call no {', '.join(sorted(helpers))}" if helpers else ""

"""ShortKernelSpec: what determines the kernels where one tile holds all of a head."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.triton.blocks.learned import Sums, looked_up
from sparse_compile.codegen.triton.tile import Tile, padded
from sparse_compile.spec import AttentionSpec
from sparse_compile.spec.attention import kernel_name

#: Up to so many queries, and keys, a tile holds them all.
LONGEST = 64
#: Up to so many features, by whether they are of 32 bits: five tiles stay in registers.
_WIDEST = {True: 64, False: 128}


@dataclass(frozen=True)
class ShortKernelSpec:
    """Everything that determines the source of the kernels. It *is* the cache key.

    Attributes:
        attention: the mask and the score; its coverage is not asked for.
        head_dim, value_dim, dtype, arch: as in :class:`sparse_compile.spec.KernelSpec`.
        tile_q, tile_kv: at least as many as there are queries and keys.
    """

    attention: AttentionSpec
    head_dim: int
    value_dim: int
    dtype: str
    arch: str
    tile_q: int
    tile_kv: int

    @functools.cached_property
    def name(self) -> str:
        """A readable unique name for its file."""
        shape = self.head_dim, self.value_dim, self.dtype, self.arch, self.tile_q, self.tile_kv
        return kernel_name("short", self.attention, *shape)

    @property
    def tile(self) -> Tile:
        """A warp for each sixteen queries; the next batch entry is loaded meanwhile."""
        warps = max(1, min(4, self.tile_q * self.tile_kv // 1024))
        stages = 1 if self.arch == "interpreter" else 2
        return Tile(self.tile_q, self.tile_kv, warps, stages)


def why_not_short(attention: AttentionSpec, dims: tuple[int, int], single: bool) -> str:
    """Why these kernels do not compute an attention, whatever its lengths; empty if they do.

    Args:
        attention: the mask and the score.
        dims: features of q and k, and of v.
        single: whether operands have 32 bits.
    """
    if attention.units or any(part.listed for part in attention.parts):
        return "which keys are attended to is listed"
    if max(dims) > _WIDEST[single]:
        return f"heads have more than {_WIDEST[single]} features"
    if any(one.sums is not Sums.PAIRS for one in looked_up(attention)):
        return "its scores learn something that is not by pairs"
    return ""


def is_short(call: AttentionCall) -> bool:
    """Whether these kernels compute a call."""
    (_, heads, n_q, _), (_, kv_heads, n_kv, _) = call.q.shape, call.k.shape
    few = 0 < n_q <= LONGEST and 0 < n_kv <= LONGEST
    if not (call.whole and few and heads == kv_heads):
        return False
    dims = call.q.shape[3], call.v.shape[3]
    return not why_not_short(call.spec, dims, call.q.element_size() > 2)


def spec_of(call: AttentionCall, dtype: str, arch: str) -> ShortKernelSpec:
    """For such a call."""
    tiles = padded(call.q.shape[2]), padded(call.k.shape[2])
    return ShortKernelSpec(call.spec, call.q.shape[3], call.v.shape[3], dtype, arch, *tiles)

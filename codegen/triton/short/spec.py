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
_WIDEST = {True: 32, False: 64}


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


def short_spec(
    attention: AttentionSpec,
    lengths: tuple[int, int],
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: str,
    arch: str,
) -> ShortKernelSpec | None:
    """What determines the kernels of a whole attention; None if these do not compute it.

    Args:
        attention: the mask and the score.
        lengths: queries and keys.
        heads: query heads and key heads.
        dims: features of q and k, and of v.
        dtype, arch: as in :class:`sparse_compile.spec.KernelSpec`.
    """
    few = 0 < min(lengths) and max(lengths) <= LONGEST
    if not few or heads[0] != heads[1] or why_not_short(attention, dims, dtype == "float32"):
        return None
    tiles = padded(lengths[0]), padded(lengths[1])
    return ShortKernelSpec(attention, *dims, dtype, arch, *tiles)


def spec_of(call: AttentionCall, dtype: str, arch: str) -> ShortKernelSpec | None:
    """That of a call."""
    if not call.whole:
        return None
    (_, heads, n_q, dim), (_, kv_heads, n_kv, width) = call.q.shape, call.v.shape
    return short_spec(call.spec, (n_q, n_kv), (heads, kv_heads), (dim, width), dtype, arch)


def is_short(call: AttentionCall) -> bool:
    """Whether these kernels compute a call."""
    single = call.q.element_size() > 2
    return spec_of(call, "float32" if single else "bfloat16", "") is not None

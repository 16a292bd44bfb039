"""SelectedKernelSpec: what determines the kernels of attention to selected keys.

They hold the features of queries and keys as tiles: one, or two for wide heads. A tile has a power
of two of columns. Heads of more than 256 features that are no such power, as the 576 of a latent
key in DeepSeek-V3, are cut in the largest power of two that fits and the rest.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from sparse_compile.codegen.triton.tile import padded
from sparse_compile.spec import AttentionSpec
from sparse_compile.spec.attention import kernel_name

#: Up to here a head is one tile, whatever its dimension.
WIDE = 256


@dataclass(frozen=True)
class Features:
    """Columns ``first, ..., first + dim - 1`` of queries and keys.

    Attributes:
        suffix: of the names of its tiles.
    """

    suffix: str
    first: int
    dim: int

    @property
    def pad(self) -> int:
        """Columns of its tiles."""
        return padded(self.dim)

    def of(self, pointer: str) -> str:
        """A pointer to its first column."""
        return f"{pointer} + {self.first}" if self.first else pointer


def features_of(head_dim: int) -> tuple[Features, ...]:
    """The tiles of a head.

    >>> [(part.dim, part.pad) for part in features_of(576)]
    [(512, 512), (64, 64)]
    >>> [(part.dim, part.pad) for part in features_of(192)]
    [(192, 256)]
    """
    main = 1 << (head_dim.bit_length() - 1)
    if head_dim <= WIDE or head_dim == main:
        return (Features("", 0, head_dim),)
    return Features("", 0, main), Features("_rest", main, head_dim - main)


@dataclass(frozen=True)
class SelectedKernelSpec:
    """Everything that determines the source of the kernels. It *is* the cache key.

    Attributes:
        attention: the mask; one part of units covers it.
        head_dim, value_dim, dtype, arch: as in :class:`sparse_compile.spec.KernelSpec`.
        members: query heads that share a key head and a selection.
        shared: whether the values are the first features of the keys, in the same memory.
    """

    attention: AttentionSpec
    head_dim: int
    value_dim: int
    dtype: str
    arch: str
    members: int
    shared: bool = False

    @functools.cached_property
    def name(self) -> str:
        """A readable unique name for its file."""
        shape = self.head_dim, self.value_dim, self.dtype, self.arch, self.members, self.shared
        return kernel_name("selected", self.attention, *shape)

    @property
    def rows(self) -> int:
        """Rows of an entry: queries of a unit, for all members."""
        return self.members * self.attention.unit_q

    @property
    def adds_by_query(self) -> bool:
        """Whether programs of queries add to the gradients of keys.

        They do where units are too short, or heads too wide, for programs that hold keys.
        """
        return self.attention.unit_kv < 16 or max(self.head_dim, self.value_dim) > WIDE

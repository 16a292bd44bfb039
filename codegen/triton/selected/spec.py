"""SelectedKernelSpec: what determines the kernels of attention to selected keys."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass

from sparse_compile.codegen.triton.selected.features import WIDE
from sparse_compile.spec import AttentionSpec


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
        short = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[self.dtype]
        shape = [self.head_dim, self.value_dim, self.dtype, self.arch, self.members, self.shared]
        identity = json.dumps([self.attention.text, *shape])
        digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
        return f"selected_d{self.head_dim}_{short}_{digest}"

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

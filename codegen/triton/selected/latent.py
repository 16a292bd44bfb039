"""The forward for latent keys on Hopper: where it can serve, and its source."""

from __future__ import annotations

from torch import Tensor

from sparse_compile.codegen.entry import Kernel
from sparse_compile.codegen.runtime import gluon_names
from sparse_compile.codegen.triton.filled import escaped, where
from sparse_compile.codegen.triton.predicate import print_predicate
from sparse_compile.codegen.triton.selected.entries import latent_entry
from sparse_compile.codegen.triton.selected.spec import SelectedKernelSpec, features_of
from sparse_compile.codegen.triton.selected.text_latent import LATENT
from sparse_compile.codegen.triton.tile import Tile
from sparse_compile.expr import KV, B, H

#: Rows and keys of a tile, warps; copies are staged by the kernel itself.
TILE = Tile(64, 64, 8, 1)


def can_be_latent(spec: SelectedKernelSpec) -> bool:
    """Whether the kernel is made for a spec: its tiles, and a mask without tables and heads."""
    parts = features_of(spec.head_dim)
    shape = spec.shared and [part.pad for part in parts] == [512, 64]
    rows = spec.attention.unit_q == 1 and spec.members > 32
    mask, printed = spec.attention.mask, print_predicate(spec.attention.mask, "kv")
    plain = not (mask.tables or mask.depends_on(B) or mask.depends_on(H) or printed.helpers)
    plain = plain and spec.attention.score is None and (not printed.keep or mask.depends_on(KV))
    half = spec.arch == "sm_90" and spec.dtype != "float32"
    return bool(half and shape and rows and plain and spec.head_dim % 8 == 0)


def is_aligned(*tensors: Tensor) -> bool:
    """Whether rows can be copied 16 bytes at a time, and the compiler can know that."""
    return all(t.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in t.stride()[:3]) for t in tensors)


def latent_kernel(spec: SelectedKernelSpec) -> Kernel:
    """The module of a spec: the kernel ``forward_latent``."""
    name, entry = f"{spec.name}_latent", latent_entry(spec, TILE)
    mask = spec.attention.mask
    printed = print_predicate(mask, "kv")
    keep = [*printed.inside, f"there = there & ({printed.keep})"] if printed.keep else []
    text = entry.text(
        LATENT,
        NAME=name,
        MASK_TEXT=escaped(str(mask)),
        WHERE=where(spec),
        MAIN=str(spec.value_dim),
        REST="64",
        HEAD_DIM=str(spec.head_dim),
        UNIT_KV=str(spec.attention.unit_kv),
        MEMBERS=str(spec.members),
        BEFORE=list(printed.before) if printed.keep else [],
        MASK=keep,
        BARRIER=gluon_names.barrier(),
        ASYNC_LOAD=gluon_names.async_load(),
    )
    text = text.replace("tl.", "gl.").replace("@triton.jit", "@gluon.jit")
    return Kernel(name, text, (entry,))

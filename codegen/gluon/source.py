"""From a KernelSpec to the source text of its forward in Gluon: same spec, same bytes."""

from __future__ import annotations

from dataclasses import replace

import sympy

from sparse_compile.codegen.entry import Entry, Kernel
from sparse_compile.codegen.gluon.entries import GluonTile, forward_entry
from sparse_compile.codegen.gluon.text.head import HEADER
from sparse_compile.codegen.gluon.text.kernel import KERNEL
from sparse_compile.codegen.gluon.text.load import LOAD
from sparse_compile.codegen.gluon.text.multiply import MULTIPLY
from sparse_compile.codegen.gluon.text.softmax import SOFTMAX
from sparse_compile.codegen.runtime import gluon_names
from sparse_compile.codegen.triton.blocks.source import kernel_of
from sparse_compile.codegen.triton.filled import escaped, filled, legend, where
from sparse_compile.codegen.triton.predicate import print_predicate
from sparse_compile.expr import KV, Q
from sparse_compile.spec import KernelSpec

_PACKED = {"bfloat16": "bf16x2", "float16": "f16x2"}
#: Registers of a thread that loads.
_LOADER = 24


def gluon_kernel(spec: KernelSpec) -> Kernel:
    """The module of a spec, with ``forward``; beside it Triton's with all its other kernels."""
    entry, triton = forward_entry(spec), kernel_of(spec)
    others = tuple(one for one in triton.entries if one.label != entry.label)
    beside = replace(triton, entries=others)
    return Kernel(f"{spec.name}_gluon", _source(spec, entry), (entry,), beside=(beside,))


def _source(spec: KernelSpec, entry: Entry) -> str:
    tile = entry.tile
    assert isinstance(tile, GluonTile)
    head = filled(
        HEADER,
        spec,
        NAME=f"{spec.name}_gluon",
        MASK=escaped(str(spec.attention.mask)),
        WHERE=where(spec),
        SYMBOLS=legend(spec.attention),
        ROWS=str(tile.together * tile.m),
        GROUPS=str(tile.together),
        KEYS=str(tile.n),
        STAGES=str(tile.stages),
        PACKED=_PACKED[spec.dtype],
    )
    sizes = ["n_q", "n_kv", *(f"s{i}" for i in range(spec.attention.mask.n_sizes))]
    coordinates, masking = _masking(spec)
    workers = range(1, tile.together)
    kernels = entry.text(
        "\n\n".join((SOFTMAX, LOAD, MULTIPLY, KERNEL)),
        SIZES=", ".join(sizes),
        COORDINATES=coordinates,
        MASKING=masking,
        TILE_LOAD=gluon_names.tile_load(),
        TILE_STORE=gluon_names.tile_store(),
        BARRIER=gluon_names.barrier(),
        ROLES=[f"(multiply, (given, {role}))," for role in _ROLES[: tile.together]],
        WARPS=", ".join(["4"] * len(workers) + ["1"]),
        REGISTERS=", ".join([str(tile.registers)] * len(workers) + [str(_LOADER)]),
    )
    return head + "\n\n" + kernels.replace("tl.", "gl.").replace("@triton.jit", "@gluon.jit")


#: What tells the warpgroups apart.
_ROLES = ("FIRST_GROUP", "SECOND_GROUP", "THIRD_GROUP")


def _masking(spec: KernelSpec) -> tuple[list[str], list[str]]:
    """Lines that find the coordinates of a block, and those that mask its scores.

    A thread holds columns 8 i + j + 2 (lane % 4). Where only distances between queries and keys
    matter, and lengths, both are told from where a thread's columns begin, so that keys are numbers
    that the compiler knows.
    """
    mask = spec.attention.part_mask(spec.attention.parts[0])
    printed = print_predicate(mask, "kv")
    lines = [line.replace("tl.", "gl.") for line in printed.before]
    lines += [line.replace("tl.", "gl.") for line in printed.masking("(kv < n_kv)")]
    row = "gl.arange(0, ROWS, OF_SCORES)[:, None]"
    column = "gl.arange(0, KEYS, ALONG)[None, :]"
    if depends_on_distances(mask.predicate):
        shifted = [
            f"column = {column}",
            "begin = kv0 + (column & 6)",
            f"q = first + {row} - begin",
            "kv = column & -7",
        ]
        lines[-1] = lines[-1].replace("(kv < n_kv)", "(kv < n_kv - begin)")
        return shifted, lines
    return [f"q = first + {row}", f"kv = kv0 + {column}"], lines


def depends_on_distances(predicate: sympy.Basic) -> bool:
    """Whether all that a predicate says of queries and keys is how far they are apart.

    >>> depends_on_distances((KV <= Q) & (Q - KV < 8)), depends_on_distances((KV <= Q) | (KV < 8))
    (True, False)
    >>> depends_on_distances((KV <= Q) & ((Q - KV < 8) | (KV < 8)))
    False
    """
    # Of any sign: what is never negative would make comparisons true that are not.
    query, distance = sympy.Dummy(integer=True), sympy.Dummy(integer=True)
    moved = predicate.xreplace({Q: query, KV: query + distance})
    return not any(sympy.expand(one).has(query) for one in _sides(moved))


def _sides(predicate: sympy.Basic) -> list[sympy.Basic]:
    """Both sides of its comparisons, as differences."""
    return [one.lhs - one.rhs for one in predicate.atoms(sympy.core.relational.Relational)]

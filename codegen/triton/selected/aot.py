"""Compile the kernels for selected keys for an architecture without a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_compile.codegen.runtime import cache
from sparse_compile.codegen.triton.aot import SHORT, TABLE_TYPES, Resources, compiled
from sparse_compile.codegen.triton.blocks.source import mask_parameters, table_ranks
from sparse_compile.codegen.triton.blocks.tiles import padded
from sparse_compile.codegen.triton.selected import latent
from sparse_compile.codegen.triton.selected.source import SelectedKernelSpec, selected_source
from sparse_compile.codegen.triton.selected.tiles import Tile, tiles_for
from sparse_compile.codegen.triton.selected.united import union_tile

_LISTS = ("INDEX", "NAMES", "COUNT", "WORK", "PLACES")
_FLOATS = ("LSE", "GRAD_LSE", "DELTA", "PART_LSE", "GRAD_K", "GRAD_V")


def compile_selected(
    spec: SelectedKernelSpec, arch: int | str | None = None
) -> dict[str, Resources]:
    """Compile the kernels of a spec. Needs no GPU; needs kernels not to be interpreted.

    Args:
        spec: what to generate.
        arch: compute capability, ``90`` or ``"sm_90"``; default that of the spec.

    Returns:
        The resources of each kernel, by name.
    """
    capability = int(str(arch or spec.arch).removeprefix("sm_"))
    spec = replace(spec, arch=f"sm_{capability}")
    module = cache.load_module(spec.name, selected_source(spec))
    tiles = tiles_for(spec)
    named = {
        "forward": tiles.forward,
        "merge": Tile(16, 16, 4, 1),
        "backward_query": tiles.backward_query,
        "forward_by_key": tiles.forward_by_key,
        "backward_key_value": tiles.backward_key_value,
    }
    if (united := union_tile(spec)) is not None:
        named["forward_union"] = united
    found = {
        name: _compiled(getattr(module, name), spec, tile, capability)
        for name, tile in named.items()
        if hasattr(module, name)
    }
    if latent.can_be_latent(spec):
        module = cache.load_module(latent.latent_name(spec), latent.latent_source(spec))
        kernel = module.forward_latent
        found["forward_latent"] = _compiled(kernel, spec, latent.TILE, capability)
    return found


def _compiled(kernel: Any, spec: SelectedKernelSpec, tile: Tile, capability: int) -> Resources:
    constants = {"GROUPS_PER_LIST": 1, "GROUPS_PER_KEY": 1, "PARTED": False, "COUNTED": True}
    constants |= {"HAS_GRAD_LSE": True}
    names = kernel.arg_names
    fixed = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in fixed else _type(name, spec) for name in names}
    if tile.descriptors:
        for name, dim in (("K", spec.head_dim), ("V", spec.value_dim)):
            short = SHORT[spec.dtype]
            signature[name] = f"tensordesc<{short}[1, 1, {tile.n}, {padded(dim)}]>"
    aligned = [
        name
        for name in names
        if signature[name].startswith("*") or ("_stride_" in name and name[0] != "t")
    ]
    return compiled(kernel, signature, fixed, aligned, tile, capability)


def _type(name: str, spec: SelectedKernelSpec) -> str:
    if name in _LISTS:
        return "*i32"
    if name in _FLOATS:
        return "*fp32"
    if name == "BALANCE":
        return "*i64"
    if name in {f"t{t}" for t in table_ranks(spec.selected.mask)}:
        return TABLE_TYPES[spec.selected.mask.tables[int(name[1:])]]
    if name == "scale":
        return "fp32"
    tables, sizes = mask_parameters(spec.selected.mask)
    known = {parameter for group in (*tables, sizes) for parameter in group}
    if name in known or name.islower():
        return "i32"
    return f"*{SHORT[spec.dtype]}"

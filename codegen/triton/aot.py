"""Compile kernels for an architecture without a GPU, and read what they use."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparse_compile.codegen.runtime import cache
from sparse_compile.codegen.triton.blocks.sections import described_box, sections_of
from sparse_compile.codegen.triton.blocks.source import kernel_source, mask_parameters, table_ranks
from sparse_compile.codegen.triton.blocks.tiles import Tile, padded, tiles_for
from sparse_compile.spec import KernelSpec

#: Types of kernel parameters, by dtype.
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_FLOATS = ("LSE", "GRAD_LSE", "STATISTICS", "PART")
_LISTS = ("start_", "counts_", "index_")
TABLE_TYPES = {"bool": "*i1", "int32": "*i32", "int64": "*i64"}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.

    Attributes:
        registers: per thread.
        spills: bytes of local memory per thread; 0 when everything fits in registers.
        shared: bytes of shared memory per program.
        ptx: its assembly.
    """

    registers: int
    spills: int
    shared: int
    ptx: str


def compile_ahead_of_time(
    spec: KernelSpec, arch: int | str | None = None, group: int = 1
) -> dict[str, Resources]:
    """Compile the kernels of a spec. Needs no GPU; needs kernels not to be interpreted.

    Args:
        spec: what to generate.
        arch: compute capability, ``90`` or ``"sm_90"``; default that of the spec. The kernels are
            those that the spec would get on that architecture.
        group: query heads per key head.

    Returns:
        The resources of each kernel of the module, by its name and, after the first, section.
    """
    capability = int(str(arch or spec.arch).removeprefix("sm_"))
    spec = replace(spec, arch=f"sm_{capability}")
    module = cache.load_module(spec.name, kernel_source(spec))
    tiles = tiles_for(spec)
    small = Tile(64, 64, 4, 1)
    named = {
        "forward": tiles.forward,
        "merge_forward": small,
        "backward_query": tiles.backward_query,
        "merge_query": small,
        "backward_key_value": tiles.backward_key_value,
        "merge_key_value": small,
    }
    over_queries = len(sections_of(spec.attention, "kv"))
    sections = {"backward_key_value": over_queries, "merge_key_value": over_queries}
    by_query = len(sections_of(spec.attention, "q"))
    return {
        f"{name}, section {section}" if section else name: _compiled(
            getattr(module, name), spec, tile, capability, group, section
        )
        for name, tile in named.items()
        for section in range(sections.get(name, by_query))
    }


def _compiled(
    kernel: Any, spec: KernelSpec, tile: Tile, capability: int, group: int, section: int
) -> Resources:
    # As the launcher would find: contiguous tables, aligned pointers, strides multiples of 16.
    rows = table_ranks(spec.attention.mask).items()
    constants = {f"t{number}_stride{rank - 1}": 1 for number, rank in rows}
    width = padded(spec.head_dim)
    constants |= {"GROUP": group, "HAS_GRAD_LSE": True, "DIM": spec.head_dim, "PAD": width}
    constants["SECTION"] = section
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else _type_of(name, spec, tile)
        for name in kernel.arg_names
    }
    aligned = [
        name
        for name in kernel.arg_names
        if signature[name].startswith("*") or ("_stride_" in name and not name.startswith("t"))
    ]
    return compiled(kernel, signature, constants, aligned, tile, capability)


def compiled(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    aligned: Sequence[str],
    tile: Any,
    capability: int,
) -> Resources:
    """Compile one kernel, and read what it uses.

    Args:
        kernel: made by ``triton.jit``.
        signature: the type of each parameter, in order.
        constants: the values of those that are constants.
        aligned: the parameters that are multiples of 16.
        tile: its ``warps`` and ``stages``.
        capability: of the architecture, such as 90.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    positions = [(list(signature).index(name),) for name in aligned]
    source = source_class(kernel)(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={position: [["tt.divisibility", 16]] for position in positions},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills = _usage(result.asm["cubin"])
    return Resources(registers, spills, result.metadata.shared, result.asm["ptx"])


def source_class(kernel: Any) -> Any:
    """What the compiler takes a kernel as."""
    from triton.compiler import ASTSource

    if not kernel.is_gluon():
        return ASTSource
    # Gluon has no public name for it.
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _type_of(name: str, spec: KernelSpec, tile: Tile) -> str:
    tables, _ = mask_parameters(spec.attention.mask)
    pointers = {group[0] for group in tables}
    if "_TILES" in name:
        return _descriptor_type(name, spec, tile)
    if name in pointers:
        return TABLE_TYPES[spec.attention.mask.tables[int(name[1:])]]
    if name in ("items", "merges") or name.startswith(_LISTS):
        return "*i32"
    if name == "scale":
        return "fp32"
    if name.isupper():
        single = name.startswith(_FLOATS)
        return "*fp32" if single else f"*{SHORT[spec.dtype]}"
    return "i32"


def _descriptor_type(name: str, spec: KernelSpec, tile: Tile) -> str:
    tensor, _, number = name.partition("_TILES")
    if tensor == "STATISTICS":
        return f"tensordesc<fp32[1, 1, 1, {tile.m}]>"
    over_queries = tensor in ("Q", "GRAD_OUT")
    extent = tile.m if over_queries else tile.n
    rows: tuple[int, ...] | None = (extent,)
    if number:
        view = spec.attention.parts[int(number[1:])]
        rows = described_box(view.q if over_queries else view.kv, extent)
    assert rows is not None
    width = padded(spec.head_dim if tensor in ("Q", "K") else spec.value_dim)
    shape = ", ".join(map(str, (1, 1, *rows, width)))
    return f"tensordesc<{SHORT[spec.dtype]}[{shape}]>"


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a compiled kernel, by the wheel's own cuobjdump."""
    import triton

    assert triton.__file__ is not None
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump gave no resource usage: {done.stdout}{done.stderr}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local

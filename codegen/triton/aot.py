"""Compile kernels for an architecture without a GPU, and read what they use."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparse_compile.codegen.entry import Entry, Kernel, Resources
from sparse_compile.codegen.generators import generators


def compile_ahead_of_time(
    spec: Any, arch: int | str | None = None, group: int = 1
) -> Mapping[str, Resources]:
    """Compile the kernels of a spec. Needs no GPU; needs kernels not to be interpreted.

    Args:
        spec: what to generate, a KernelSpec or a SelectedKernelSpec.
        arch: compute capability, ``90`` or ``"sm_90"``; default that of the spec. The kernels are
            those that the spec would get on that architecture.
        group: query heads per key head.

    Returns:
        The resources of each kernel of the module, by its name and, after the first, section.
    """
    spec = replace(spec, arch=f"sm_{_capability(arch or spec.arch)}")
    return compiled(generators().choose(spec).kernel, spec.arch, GROUP=group).resources


def compiled(kernel: Kernel, arch: int | str, **assumed: Any) -> Kernel:
    """A kernel with the resources of its entries, compiled as their launches would be.

    Args:
        kernel: of any kind.
        arch: as for :func:`compile_ahead_of_time`.
        assumed: values of constants other than the entries assume.
    """
    capability = _capability(arch)
    return replace(
        kernel,
        resources={
            entry.label: _resources(module.function(entry), entry, capability, assumed)
            for module in (kernel, *kernel.beside)
            for entry in module.entries
        },
    )


def _capability(arch: int | str) -> int:
    return int(str(arch).removeprefix("sm_"))


def _resources(
    function: Any, entry: Entry, capability: int, assumed: Mapping[str, Any]
) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget

    if list(entry.names) != list(function.arg_names):
        raise TypeError(f"{entry.name} takes {function.arg_names}, and declares {entry.names}")
    parameters = entry.parameters
    aligned = [number for number, p in enumerate(parameters) if p.is_aligned]
    source = _source_class(function)(
        fn=function,
        signature={p.name: p.type for p in parameters},
        constexprs={p.name: assumed.get(p.name, p.assumed) for p in parameters if p.is_constant},
        attrs={(number,): [["tt.divisibility", 16]] for number in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    result = triton.compile(source, target=target, options=dict(entry.options))
    registers, spills = _usage(result.asm["cubin"])
    return Resources(registers, spills, result.metadata.shared, result.asm["ptx"])


def _source_class(function: Any) -> Any:
    """What the compiler takes a kernel as."""
    from triton.compiler import ASTSource

    if not function.is_gluon():
        return ASTSource
    # Gluon has no public name for it.
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


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

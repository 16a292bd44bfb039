"""The generated kernels of a call, as values: what ``sparse-compile code`` prints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparse_compile.codegen.entry import Kernel
from sparse_compile.codegen.generators import generators
from sparse_compile.codegen.runtime.generated import write_source
from sparse_compile.inspect.explain import Examined, examine, kernel_spec
from sparse_compile.passes.graph_edit import expected
from sparse_compile.patterns.scored import Scored
from sparse_compile.selection.select import prepared
from sparse_compile.sites.plan import Plan
from sparse_compile.spec.target import Target

#: Of the GPU that is planned for where none is here, an H200.
_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class GeneratedKernel:
    """A module of kernels of one attention.

    Attributes:
        site: number of the attention, as in the report.
        reason: why there is a kernel, or why there is none.
        name: name of the module; empty where there is none.
        path: the file that holds ``source``; empty where there is none.
        source: its Triton source; empty where there is none.
    """

    site: int
    reason: str
    name: str = ""
    path: str = ""
    source: str = ""


def of_call(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    arch: str | None = None,
) -> tuple[GeneratedKernel, ...]:
    """For each attention of a call, its kernels. Needs triton, but no GPU.

    Args:
        model: a module or a function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        options: options of the backend.
        arch: the GPU to generate for, as ``"sm_90"``; default the one here, else that.
    """
    here = arch is None and torch.cuda.is_available()
    gpu = Target.of(torch.device("cuda", torch.cuda.current_device())) if here else None
    target = gpu or Target("cuda", arch or "sm_90", _MULTIPROCESSORS)
    sites, _ = examine(model, args, kwargs, options, target)
    return tuple(kernel for n, site in enumerate(sites) for kernel in of_site(n, site))


def of_site(number: int, site: Examined) -> tuple[GeneratedKernel, ...]:
    """The kernels of one attention that was planned for a GPU; where there are none, why."""
    plan, target, reason = site.plan, site.trace.target, site.trace.decided.reason
    if plan is None or target is None or target.kind != "cuda" or plan.executor == "sdpa":
        return (GeneratedKernel(number, reason),)
    found = [*_of_parts(plan, site, target.arch), *_of_selection(site)]
    return tuple(
        GeneratedKernel(
            number, reason, made.name, str(write_source(made.name, made.source)), made.source
        )
        for made in found
    ) or (GeneratedKernel(number, reason),)


def _of_parts(plan: Plan, site: Examined, arch: str) -> Iterator[Kernel]:
    """What computes each part of the coverage."""
    from sparse_compile.codegen.triton.selected.spec import SelectedKernelSpec

    for piece, _ in plan.spec.pieces:
        of_blocks = kernel_spec(plan, arch, piece)
        if not piece.units:
            kernel = generators().choose(of_blocks).kernel
            yield from (kernel, *kernel.beside)
            continue
        widths = of_blocks.head_dim, of_blocks.value_dim, of_blocks.dtype
        lists = 1 if site.chosen is None else site.chosen.index.shape[1]
        # Query heads that share a key head and a list.
        members = expected(plan.site.q, "h") // math.lcm(expected(plan.site.k, "h"), lists)
        shared = plan.site.k.node is plan.site.v.node
        spec = SelectedKernelSpec(piece, *widths, arch, members, shared)
        kernel = generators().choose(spec).kernel
        yield from (kernel, *kernel.beside)


def _of_selection(site: Examined) -> Iterator[Kernel]:
    """What makes the lists of a pattern that scores."""
    from sparse_compile.codegen.triton.selection.choose import choose_kernel, choose_spec

    found = site.selecting
    if found is not None and isinstance(found.leaf, Scored):
        made = prepared(found.leaf, *found.content, found.mask, found.tables, found.sizes)
        yield choose_kernel(choose_spec(made))

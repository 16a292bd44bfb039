"""The generated kernels of a call, as values: what ``sparse-compile code`` prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sparse_compile.inspect.explain import Examined, examine, kernel_spec
from sparse_compile.spec.target import Target

#: Of the GPU that is planned for where none is here, an H200.
_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class GeneratedKernel:
    """The kernel of one attention.

    Attributes:
        site: number of the attention, as in the report.
        reason: why there is a kernel, or why there is none.
        name: name of the kernel; empty where there is none.
        path: the file that holds ``source``; empty where there is none.
        source: Triton source of the forward and the backward; empty where there is none.
    """

    site: int
    reason: str
    name: str = ""
    path: str = ""
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def of_call(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    arch: str | None = None,
) -> tuple[GeneratedKernel, ...]:
    """For each attention of a call, its kernel. Needs triton, but no GPU.

    Args:
        model: a module or a function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        options: options of the backend.
        arch: the GPU to generate for, as ``"sm_90"``; default the one the tensors are on.
    """
    target = None if arch is None and torch.cuda.is_available() else gpu(arch)
    sites, _ = examine(model, args, kwargs, options, target)
    return tuple(of_site(number, site) for number, site in enumerate(sites))


def gpu(arch: str | None = None) -> Target:
    """A GPU to generate for, that need not be here."""
    return Target("cuda", arch or "sm_90", _MULTIPROCESSORS)


def of_site(number: int, site: Examined) -> GeneratedKernel:
    """The kernel of one attention that was planned for a GPU."""
    from sparse_compile.codegen.triton import kernel_path, kernel_source

    plan, target = site.plan, site.trace.target
    reason = site.trace.decided.reason
    alone = plan is not None and plan.selected is not None and plan.selected.alone
    if plan is None or alone or plan.executor in ("sdpa", "selected"):
        return GeneratedKernel(number, reason)
    assert target is not None
    spec = kernel_spec(plan, target.arch)
    return GeneratedKernel(number, reason, spec.name, str(kernel_path(spec)), kernel_source(spec))

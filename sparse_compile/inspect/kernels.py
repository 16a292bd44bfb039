"""The generated kernels of a call, as values: what ``sparse-compile code`` prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sparse_compile.inspect.explain import Examined, examine, kernel_spec
from sparse_compile.options import Options
from sparse_compile.passes import Decision, choose_layout, choose_selection
from sparse_compile.sites.plan import Plan


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
    sites, _ = examine(model, args, kwargs, options)
    parsed = Options.parse(options)
    return tuple(of_site(number, site, parsed, arch) for number, site in enumerate(sites))


def on_gpu(plan: Plan, options: Options) -> Decision:
    """What a plan for the CPU would be on a GPU."""
    cuda = torch.device("cuda")
    if plan.selected is None:
        return choose_layout(plan.site, plan.lifted, cuda, options)
    return choose_selection(plan.site, plan.lifted, plan.selected.lifted, cuda, options)


def of_site(
    number: int, site: Examined, options: Options, arch: str | None = None
) -> GeneratedKernel:
    """The kernel of one attention; on the CPU, the one that a GPU ``arch`` (sm_90) would run."""
    from sparse_compile.codegen.triton import kernel_path, kernel_source

    decision = site.decision
    chosen = decision.selected if isinstance(decision, Plan) else None
    if chosen is not None and chosen.alone:
        return GeneratedKernel(number, decision.reason)
    if isinstance(decision, Plan) and decision.executor == "cpu":
        # Block shapes follow the device: decide again, as on a GPU.
        decision = on_gpu(decision, options)
        arch = arch or "sm_90"
    if not isinstance(decision, Plan) or decision.executor in ("sdpa", "selected"):
        return GeneratedKernel(number, decision.reason)
    spec = kernel_spec(decision, arch)
    path = str(kernel_path(spec))
    return GeneratedKernel(number, decision.reason, spec.name, path, kernel_source(spec))

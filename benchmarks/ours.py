"""Our side of a comparison: from a pattern to what runs, in one place."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparse_compile
from benchmarks.accuracy import Problem, Run
from sparse_compile.api.plan import name_of, planned
from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.layout import Layout, build_views
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.patterns import Pattern
from sparse_compile.spec import AttentionSpec

#: Caches of this package hold what follows from lengths; those named below hold what follows from
#: the mask alone, which a second length finds there too.
_PACKAGE = "sparse_compile.layout"
_OF_THE_MASK = ("_axis", "canonical", "_class_coordinates")
#: Of neither lengths nor masks.
_OF_NOTHING = ("_descriptor_class", "_all_lines")
#: What chooses views, which happens once, when a call is compiled.
_PLANNING = ("split_views",)


@dataclass(frozen=True)
class Ours:
    """What the kernels need for a pattern at given lengths."""

    spec: AttentionSpec
    tables: list[Tensor]
    layout: Layout

    def call(self, q: Tensor, k: Tensor, v: Tensor) -> AttentionCall:
        """What an executor takes."""
        scale = q.shape[-1] ** -0.5
        return AttentionCall(q, k, v, self.tables, [], [], scale, self.spec, layout=self.layout)


def spec_of(pattern: Pattern, n: int, heads: int, device: str = "cuda") -> AttentionSpec:
    """The spec that :func:`sparse_compile.attention` runs."""
    shape = ProblemShape(1, heads, n, n)
    text = planned(name_of(pattern, []), torch.device(device).type, shape).spec
    if text:
        return AttentionSpec.parse(text)
    # A causal mask is left to SDPA; our kernels for it are measured all the same.
    return AttentionSpec(pattern.bound().expr, block_q=64, block_kv=64)


def ours(pattern: Pattern, n: int, heads: int, device: str = "cuda") -> Ours:
    spec = spec_of(pattern, n, heads, device)
    tables = pattern.bound().trimmed().tables(device, n, n, 1, heads)
    return Ours(spec, tables, layout_of_spec(spec, tables, n, heads, device))


def layout_of_spec(
    spec: AttentionSpec, tables: list[Tensor], n: int, heads: int, device: str
) -> Layout:
    return build_views(spec, ProblemShape(1, heads, n, n), tables, device=device)


def layout_of(pattern: Pattern, n: int, device: str) -> Layout:
    """``pattern.layout``, per head class."""
    try:
        layout: Layout = pattern.layout(n, n, device=device)
    except AttributeError:  # it is not there yet
        return ours(pattern, n, 1, device).layout
    return layout


def kernels(p: Problem, backward: bool) -> Run:
    """The generated kernels as the operator launches them, layout and all else at hand."""
    from sparse_compile.codegen.triton.blocks import executor

    _, heads, n, _ = p.inputs[0].shape
    made = ours(p.pattern, n, heads, p.device)
    call = made.call(*p.inputs)
    out, lse = executor.forward(call)

    def gradients(grad_out: Tensor) -> tuple[Tensor, ...]:
        return executor.backward(call, AttentionResult(out, lse, grad_out))

    return Run(
        lambda: executor.forward(call)[0],
        gradients if backward else None,
        notes={
            "views": len(made.spec.parts),
            "nnz_blocks": made.layout.nnz_blocks,
            "layout_bytes": made.layout.nbytes,
            "visited_pairs_per_head": made.layout.visited_pairs // heads,
            "allowed_pairs_per_head": _allowed_pairs(p, made.layout) // heads,
        },
    )


def _allowed_pairs(p: Problem, layout: Layout) -> int:
    if p.case.pairs is not None:
        return p.case.pairs(p.n) * layout.heads
    return layout.allowed_pairs


def whole_call(p: Problem, backward: bool) -> Run:
    """:func:`sparse_compile.attention`, with all that it does on the host."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_compile.attention(q, k, v, mask=p.pattern)

    return by_autograd(call, p.inputs, backward)


def by_autograd(
    call: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    backward: bool,
    native: Callable[[Tensor], Tensor] = lambda t: t,
    notes: dict[str, Any] | None = None,
) -> Run:
    """An implementation that autograd differentiates; ``native`` chooses how to store operands."""
    inputs = [native(t.detach().clone()).requires_grad_(backward) for t in tensors]
    out = call(*inputs)

    def gradients(grad_out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, grad_out, retain_graph=True)

    return Run(lambda: call(*inputs), gradients if backward else None, native, notes or {})


def forgetter(views: bool = True, mask: bool = False) -> Callable[[], None]:
    """What empties the caches of layouts and schedules, as a call with a new length finds them.

    The caches are looked for here and not there: a walk through all modules would also empty those
    of the processor, which a new length does not.

    Args:
        views: also the choice of views.
        mask: also what follows from the mask alone.
    """
    kept = (*_OF_NOTHING, *(() if mask else _OF_THE_MASK), *(() if views else _PLANNING))
    found = [
        value.cache_clear
        for name, module in list(sys.modules.items())
        # Kernels that list blocks stay compiled, as those of the attention do.
        if name.startswith(_PACKAGE)
        for attribute, value in vars(module).items()
        if hasattr(value, "cache_clear") and attribute not in kept
    ]

    def forget() -> None:
        for clear in found:
            clear()

    return forget


def cold_call(p: Problem) -> Callable[[], Any]:
    """Layout and forward of one call."""
    from sparse_compile.codegen.triton.blocks import executor

    _, heads, n, _ = p.inputs[0].shape
    spec = spec_of(p.pattern, n, heads, p.device)
    tables = p.pattern.bound().tables(p.device, n, n, 1, heads)

    def run() -> Any:
        layout = layout_of_spec(spec, tables, n, heads, p.device)
        return executor.forward(Ours(spec, tables, layout).call(*p.inputs))

    return run


def wall_ms(
    run: Callable[[], Any],
    before: Callable[[], None] = lambda: None,
    repeats: int = 20,
    at_most_s: float = 60,
    device: str = "cuda",
) -> float:
    """Median of the time on the host's clock from an idle device to an idle device.

    Args:
        run: what is timed, after one call for warmth.
        before: called before each, untimed.
        repeats: fewer if they take longer than ``at_most_s``.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    before()
    run()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < repeats and (not times or time.perf_counter() - began < at_most_s):
        before()
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)

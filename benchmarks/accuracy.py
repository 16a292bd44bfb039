"""What is computed in a comparison, and whether a result is as accurate as dense eager attention.

Every result has to come as close to a dense fp32 reference as dense eager attention in bf16 does,
times 1.1. Up to 16384 tokens all queries of two heads are compared. Beyond, it is 512 queries: the
gradient of the output is zero at all others, so that the gradients of all keys are known too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.kernels import NAMES, dense, relative_error
from sparse_compile.expr import evaluate
from sparse_compile.patterns import Pattern

TOLERANCE = 1.1
ALL_QUERIES_UP_TO = 16384
_PAIRS_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Run:
    """One implementation on the inputs of a problem.

    Attributes:
        forward: computes the output [1, H, N, D].
        backward: the gradients of q, k and v from that of the output; None if not wanted.
        native: puts the gradient of the output into the storage that this one prefers.
        notes: what else to report.
    """

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], tuple[Tensor, ...]] | None
    native: Callable[[Tensor], Tensor] = lambda grad: grad
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """Inputs of one comparison, the true results of some heads, and the errors to allow.

    Attributes:
        rows: the queries that are compared.
        grad_checked: gradient of the output, zero at all other queries.
        truth: out and dq [heads, rows, D], dk and dv [heads, N, D], fp32.
    """

    case: Case
    pattern: Pattern
    inputs: tuple[Tensor, Tensor, Tensor]
    grad_out: Tensor
    grad_checked: Tensor
    rows: Tensor
    heads: list[int]
    truth: tuple[Tensor, ...]
    allowed: tuple[float, ...]

    @property
    def n(self) -> int:
        return self.inputs[0].shape[2]

    @property
    def device(self) -> str:
        return self.inputs[0].device.type


def problem(
    case: Case, n: int, heads: int, dim: int, device: str = "cuda", dtype: Any = torch.bfloat16
) -> Problem:
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, grad_out = (
        torch.randn(1, heads, n, dim, device=device, dtype=dtype, generator=generator)
        for _ in range(4)
    )
    rows = checked_rows(n).to(device)
    grad_checked = torch.zeros_like(grad_out)
    grad_checked[:, :, rows] = grad_out[:, :, rows]
    pattern = case.pattern(n, device)
    keep = mask_rows(pattern, rows, n, heads)
    some = sorted({min(3, heads - 1), heads - 1})
    by_head = [(q[0, h][rows], k[0, h], v[0, h], grad_out[0, h][rows]) for h in some]
    truth = _stacked([dense(*args, keep, torch.float32) for args in by_head])
    eager = _stacked([dense(*args, keep, dtype) for args in by_head])
    errors = (relative_error(e, t) for e, t in zip(eager, truth, strict=True))
    allowed = tuple(TOLERANCE * error for error in errors)
    return Problem(case, pattern, (q, k, v), grad_out, grad_checked, rows, some, truth, allowed)


def _stacked(per_head: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(parts) for parts in zip(*per_head, strict=True))


def checked_rows(n: int) -> Tensor:
    """The queries to compare: all, or the first, some in the middle, the last and random ones."""
    if n <= ALL_QUERIES_UP_TO:
        return torch.arange(n)
    middle = n // 2 - 37
    fixed = [range(96), range(middle, middle + 128), range(n - 64, n)]
    chosen = torch.cat([torch.arange(part.start, part.stop) for part in fixed])
    others = torch.ones(n, dtype=torch.bool)
    others[chosen] = False
    shuffled = torch.randperm(n - chosen.numel(), generator=torch.Generator().manual_seed(0))
    random = others.nonzero()[:, 0][shuffled[: 512 - chosen.numel()]]
    return torch.cat([chosen, random]).sort().values


def mask_rows(pattern: Pattern, rows: Tensor, n: int, heads: int = 1) -> Tensor:
    """bool [rows, n]: these rows of the mask, which must be the same for every head."""
    bound, device = pattern.bound(), rows.device
    tables = bound.tables(device, n, n, 1, heads)
    every = torch.arange(n, device=device)
    parts = []
    for some in rows.split(max(1, _PAIRS_AT_ONCE // n)):
        where = {"q": some[:, None], "kv": every[None]}
        part = evaluate(bound.expr, where, n, n, tables)
        parts.append(part.expand(some.numel(), n))
    return torch.cat(parts)


def errors_of(p: Problem, run: Run) -> dict[str, float]:
    """The relative error of each result; raises where one is not accurate enough."""
    results = [run.forward().detach()[0, p.heads][:, p.rows]]
    if run.backward is not None:
        dq, dk, dv = run.backward(run.native(p.grad_checked))
        results += [dq[0, p.heads][:, p.rows], dk[0, p.heads], dv[0, p.heads]]
    errors = [relative_error(r, t) for r, t in zip(results, p.truth, strict=False)]
    for name, error, allowed in zip(NAMES, errors, p.allowed, strict=False):
        if not error <= allowed:
            raise ArithmeticError(f"{name} has an error of {error:.2e}, allowed is {allowed:.2e}")
    return dict(zip(NAMES, errors, strict=False))

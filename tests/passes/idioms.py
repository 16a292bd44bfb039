"""Programs as people write them, compiled by the backend, next to what they compute by themselves.

A program takes q, k, v and what else it reads; the gradients of whatever requires one are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_compile.inspect.explain import Examined, explain_with
from sparse_compile.inspect.report import SiteReport
from sparse_compile.passes import pipeline
from tests.tolerance import assert_close_as_eager, relative_error

Program = Callable[..., Tensor]

B, H, N, D = 2, 4, 40, 16
INF = float("inf")
#: The score of hidden keys in fp32.
LOW = torch.finfo(torch.float32).min
SPARSE = {"decide": "sparse"}


def tensors(*shapes: tuple[int, ...], seed: int = 0, grad: bool = True) -> list[Tensor]:
    """Random numbers that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_(grad) for shape in shapes]


def qkv(heads: int = H, n_q: int = N) -> list[Tensor]:
    """Queries, and keys and values of some heads."""
    return tensors((B, H, n_q, D), (B, heads, N, D), (B, heads, N, D))


def causal() -> Tensor:
    """Which keys are not after a query, bool [N, N]; as part of a program, not a tensor it gets."""
    return torch.arange(N) <= torch.arange(N)[:, None]


def left() -> Tensor:
    """Padding int64 [B, N], 1 where there is a token: beside causality, rows are fully masked."""
    return (torch.arange(N) >= torch.tensor([[0], [7]])).long()


def right() -> Tensor:
    """Padding int64 [B, N] behind the tokens: every query has a key."""
    return (torch.arange(N) < torch.tensor([[N], [N - 9]])).long()


def visible(pad: Tensor) -> Tensor:
    """Causality and padding, bool [B, 1, N, N]."""
    return causal() & pad[:, None, None].bool()


class Compiled:
    """A program compiled by the backend, which rewrites whatever it knows.

    Attributes:
        sites: what became of each attention that was compiled so far.
    """

    def __init__(self, program: Program, dynamic: bool = False, **options: Any) -> None:
        torch._dynamo.reset()
        self.sites: list[SiteReport] = []
        self._run = pipeline.run
        self._compiled = torch.compile(
            program,
            backend="sparse_compile",
            options={**SPARSE, **options},
            dynamic=dynamic,
            fullgraph=True,
        )

    def __call__(self, *args: Any) -> Tensor:
        with mock.patch.object(pipeline, "run", self._noted):
            made: Tensor = self._compiled(*args)
        return made

    def _noted(self, *args: Any) -> Any:
        traces = self._run(*args)
        self.sites += [Examined(trace).report() for trace in traces]
        return traces


def outcome(program: Program, args: Sequence[Any]) -> list[Tensor | None]:
    """The output, and the gradients of all arguments that have one under a fixed loss."""
    wanted = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    # SDPA's fused backward on the CPU rounds the log-sum-exp of rows that are fully masked away;
    # the plain one is what the program means. Half precision is compared with what people get.
    plain = all(arg.dtype is torch.float32 for arg in wanted)
    with sdpa_kernel(SDPBackend.MATH if plain else list(SDPBackend.__members__.values())):
        out = program(*args)
        if not wanted:
            return [out]
        loss = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
        return [out.detach(), *torch.autograd.grad((out * loss).sum(), wanted, allow_unused=True)]


def in_dtype(args: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """Floating arguments in a dtype; those in another one as new leaves."""

    def cast(arg: Any) -> Any:
        if not isinstance(arg, Tensor) or not arg.is_floating_point() or arg.dtype is dtype:
            return arg
        return arg.detach().to(dtype).requires_grad_(arg.requires_grad)

    return [cast(arg) for arg in args]


def assert_rewritten(
    program: Program,
    *args: Any,
    dtype: torch.dtype = torch.float32,
    dynamic: bool = False,
    **options: Any,
) -> SiteReport:
    """That all attention is rewritten, and gives what the program gives: output and gradients.

    In fp32 up to 1e-5 of the norm; in half precision no worse than the program itself against fp64.

    Returns:
        what became of the first attention.
    """
    given = in_dtype(args, dtype)
    fast = Compiled(program, dynamic, **options)
    ours = outcome(fast, given)
    assert fast.sites
    for site in fast.sites:
        assert site.rewritten, site.reason
    eager = outcome(program, given)
    exact = eager if dtype is torch.float32 else outcome(program, in_dtype(given, torch.float64))
    for number, (value, own, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        name = f"gradient {number}" if number else "output"
        assert (value is None) == (own is None), f"{name} exists on one side only"
        if value is None or own is None or truth is None:
            continue
        assert (value.shape, value.dtype) == (own.shape, own.dtype), name
        if dtype is torch.float32:
            error = relative_error(value, own)
            assert error <= 1e-5, f"{name}: error {error:.3e}"
        else:
            assert_close_as_eager(name, value, own, truth)
    return fast.sites[0]


def assert_left(reason: str, program: Program, *args: Any, **options: Any) -> SiteReport:
    """That no attention of a call is rewritten, and that users are told why.

    Returns:
        what became of the first attention.
    """
    torch._dynamo.reset()
    report = explain_with({**SPARSE, **options})(program, *args)
    assert report.sites
    assert report.rewritten == 0
    for site in report.sites:
        assert reason in site.reason, site.reason
    return report.sites[0]

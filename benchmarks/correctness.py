"""Every pattern through ``sparse_compile.attention``, forward and gradients, against fp64.

    python -m benchmarks.correctness --device cuda --out benchmarks/results/patterns_h200.json

Half precision: the error against the fp64 reference is at most 1.1 times that of dense eager
attention in the same precision. fp32: at most 1e-5.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparse_compile
from benchmarks.environment import write_json
from sparse_compile import patterns as P
from sparse_compile.reference import attention as reference

NAMES = ("out", "dq", "dk", "dv")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Case:
    """A pattern on a problem: [batch, query heads, key heads, tokens] and the head dim."""

    pattern: P.Pattern
    n: tuple[int, int]
    heads: tuple[int, int] = (4, 2)
    batch: int = 2
    dim: int = 64

    def __str__(self) -> str:
        return f"{self.pattern!r}-n{self.n}"


def cases(scale: int = 1) -> list[Case]:
    """All patterns, on lengths of a few hundred tokens times ``scale``; some ragged."""
    n = 256 * scale
    even, ragged = (n, n), (n - 37, n - 37)
    ids = torch.arange(n) // 50
    per_batch = torch.stack([torch.arange(n) // 50, torch.arange(n) // 90])
    layout = torch.rand(4, -(-n // 32), -(-n // 32), generator=torch.Generator().manual_seed(0))
    side = 16 * scale
    return [
        Case(P.Causal(), ragged, heads=(4, 4)),
        Case(P.Causal(), (219, 219), heads=(4, 2)),
        Case(P.Causal("lower_right"), (n // 3, n)),
        Case(P.SlidingWindow(40), ragged),
        Case(P.SlidingWindow(63, 0), even, heads=(3, 1), dim=128),
        Case(P.SlidingWindow(30, 0, align="lower_right"), (100, n)),
        Case(P.Dilated(12, 4), even),
        Case(P.Dilated(9, 5, causal=True), ragged),
        Case(P.Strided(16), even, dim=128),
        Case(P.Strided(24, 40), ragged, heads=(7, 1)),
        Case(P.Strided(16, causal=False), even),
        Case(P.Fixed(32, 4), even),
        Case(P.Fixed(48, 8), ragged),
        Case(P.BlockLocal(64), ragged),
        Case(P.SlidingWindow(16) | P.Global(5), ragged),
        Case(P.SlidingWindow(16) | P.Global((0, 70, 71, 150)), even),
        Case(P.Random(32, 2, seed=3) | P.SlidingWindow(8), even),
        Case(P.Random(32, 2, seed=3, per_head=True) | P.SlidingWindow(8), even),
        Case(P.BigBird(32, 1, 1, 3), even),
        Case(P.Longformer(64, 1), ragged),
        Case(P.Axial((side, side)), (side * side,) * 2, batch=1),
        Case(P.Axial((8, 8, 4 * scale)), (256 * scale,) * 2),
        Case(P.Neighborhood((16, 16 * scale), (5, 7)), even),
        Case(P.Neighborhood((16, 16 * scale), (5, 3), dilation=(1, 3), causal=(False, True)), even),
        Case(P.SlidingTile((16, 16 * scale), (4, 4), (3, 3)), even),
        Case(P.PrefixLM(40), ragged),
        Case(P.PrefixLM(torch.tensor([10, 100])), even),
        Case(P.Documents(ids), even),
        Case(P.Documents(per_batch) & P.Causal(), even),
        Case(P.Padding((n, n // 2)) & P.Causal(), even),
        Case(P.Padding((n, n // 3), side="left") & P.Causal(), even),
        Case(P.PrefixTree.of_segments((n // 2, n // 4, n // 8, n // 8), (-1, 0, 0, 2)), even),
        Case(P.PrefixTree.of_parents(torch.arange(n) // 3 - 1), even),
        Case(
            P.DraftTree.of_parents(torch.arange(40) // 2 - 1, torch.tensor([100, n - 40])), (40, n)
        ),
        Case(P.Packed((0, 100, n // 2, n), P.presets.streaming_llm(30, 2)), even),
        Case(P.Packed((0, 90, n), P.PrefixLM((20, 70)) & P.BlockLocal(64)), even),
        Case(P.Packed((0, 90, n), P.Causal("lower_right"), (0, 50, 117)), (117, n)),
        Case(P.BlockDiffusion(16), even),
        Case(P.presets.llama4_chunked(64), ragged),
        Case(P.BlockSparse(layout < 0.3, 32) | P.SlidingWindow(1), even),
        Case(P.Predicate(near_or_even), ragged),
        Case(P.heads([P.Strided(16), P.SlidingWindow(20), P.Dilated(5, 4), P.Causal()]), even),
        Case((P.SlidingWindow(32) & P.Documents(ids)) | P.Global(2), even),
        Case(P.Causal() & ~P.BlockLocal(16), even),
    ]


def near_or_even(b: Any, h: Any, q: Any, kv: Any) -> Any:
    """A mask function in FlexAttention's signature."""
    return (abs(q - kv) < 9) | ((kv % 8 == 0) & (kv <= q))


def errors(case: Case, device: str, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """The errors of output and gradients, and what is allowed."""
    (n_q, n_kv), (heads, kv_heads) = case.n, case.heads
    generator = torch.Generator().manual_seed(1)
    shapes = [(heads, n_q), (kv_heads, n_kv), (kv_heads, n_kv), (heads, n_q)]
    q, k, v, grad = (
        torch.randn(case.batch, h, n, case.dim, generator=generator).to(device, dtype)
        for h, n in shapes
    )
    mask = case.pattern.dense(n_q, n_kv, case.batch, heads, device)
    ours = _results(lambda *x: sparse_compile.attention(*x, mask=case.pattern), q, k, v, grad)
    exact = (t.double() for t in (q, k, v, grad))
    truth = _results(lambda *x: reference(*x, mask)[0], *exact)
    eager = _results(lambda *x: _eager(*x, mask), q, k, v, grad)
    allowed = [1.1 * relative(e, t) for e, t in zip(eager, truth, strict=True)]
    if dtype == torch.float32:
        allowed = [1e-5] * len(NAMES)
    return [relative(o, t) for o, t in zip(ours, truth, strict=True)], allowed


def _results(run: Any, *given: Tensor) -> list[Tensor]:
    *inputs, grad = (t.detach().clone() for t in given)
    inputs = [t.requires_grad_() for t in inputs]
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = mask.expand(*q.shape[:2], *mask.shape[2:])
    empty = ~mask.any(-1, keepdim=True)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask & ~empty, float("-inf"))
    return (scores.softmax(-1) @ v).masked_fill(empty, 0.0)


def relative(value: Tensor, truth: Tensor) -> float:
    """``||value - truth|| / ||truth||``; infinite where a NaN is."""
    value, truth = value.double(), truth.double()
    error = ((value - truth).norm() / truth.norm().clamp(min=1e-30)).item()
    return float("inf") if error != error else error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=int, default=2, help="lengths, in 256 tokens")
    parser.add_argument("--out", required=True, help="path of the JSON file")
    parser.add_argument("--part", default="0/1", help="every n-th case from the k-th on, as k/n")
    args = parser.parse_args()
    first, step = map(int, args.part.split("/"))
    rows: list[dict[str, Any]] = []
    for case in cases(args.scale)[first::step]:
        for dtype in DTYPES:
            found, allowed = errors(case, args.device, dtype)
            ok = all(e <= a for e, a in zip(found, allowed, strict=True))
            row = {"pattern": repr(case.pattern), "n": case.n, "heads": case.heads}
            row |= {"batch": case.batch, "dim": case.dim, "dtype": str(dtype), "passed": ok}
            row["errors"] = dict(zip(NAMES, found, strict=True))
            row["allowed"] = dict(zip(NAMES, allowed, strict=True))
            rows.append(row)
            print("ok  " if ok else "FAIL", case, dtype, [f"{e:.1e}" for e in found], flush=True)
            write_json(args.out, rows, rule=__doc__)


if __name__ == "__main__":
    main()

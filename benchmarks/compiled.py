"""Every pattern of the library, trained, through ``torch.compile``, beside Inductor.

    python -m benchmarks.compiled --device cpu --n 2048 --out compiled_cpu.json
    python -m benchmarks.compiled --device cuda --n 16384 --dtype bfloat16 --out compiled.json

A model is one call of SDPA. Its mask is *written*, made in the model by comparing positions, or
*named*, an annotation on a model without a mask. The first is given to Inductor as well; where
content selects there is no such mask, and Inductor's model is given the mask tensor that was
selected. Output and gradients of both are compared with dense matrices in fp64 (on a GPU in fp32)
before anything is timed: in half precision each error may be 1.1 times that of dense matrices in
that precision, in fp32 1e-5. Inductor's own are only written down: on rows without keys PyTorch's
kernels leave gradients. Times are medians of calls that take turns.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_compile
from benchmarks.compiled_cases import EVERY, Case, Size
from benchmarks.cpu import interleaved
from benchmarks.environment import write_json
from benchmarks.kernels import NAMES, dense, relative_error

Row = dict[str, Any]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Written(nn.Module):
    """Attention whose mask is made by comparing positions, in every call."""

    def __init__(self, mask_mod: Callable[..., Tensor]) -> None:
        super().__init__()
        self.mask_mod = mask_mod

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=written_mask(self.mask_mod, q))


class Named(nn.Module):
    """Attention to everything, to be annotated."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Given(nn.Module):
    """Attention under a mask tensor."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


def written_mask(mask_mod: Callable[..., Tensor], q: Tensor) -> Tensor:
    """bool, broadcast to [B, H, N, N]."""
    b, h, at, _ = (torch.arange(size, device=q.device) for size in q.shape)
    h, at = h[:, None, None], torch.arange(q.shape[2], device=q.device)
    return mask_mod(b[:, None, None, None], h, at[:, None], at)


def mask_of(case: Case, size: Size, q: Tensor, k: Tensor) -> Tensor:
    """bool [1, H, N, N], not stored where it is the same for each head: what the case allows."""
    if case.mask_mod is not None:
        mask = written_mask(case.mask_mod(size), q)
        return mask[(None,) * (4 - mask.dim())].expand(1, size.heads, -1, -1)
    chosen = sparse_compile.select(case.pattern(size), q, k).dense(size.n, size.n)
    causal = torch.ones(size.n, size.n, dtype=torch.bool, device=q.device).tril()
    return chosen.repeat_interleave(size.heads // chosen.shape[1], 1) & causal


def models(case: Case, size: Size, mask: Tensor) -> dict[str, Attend]:
    """The compiled models by name; the last one is Inductor's."""
    ours = functools.partial(torch.compile, backend="sparse_compile")
    named = sparse_compile.mask(Named(), case.pattern(size))
    if case.mask_mod is None:
        return {"named": ours(named), "inductor": torch.compile(Given(mask))}
    written = Written(case.mask_mod(size))
    return {"written": ours(written), "named": ours(named), "inductor": torch.compile(written)}


def training_step(attend: Attend, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """out, dq, dk and dv."""
    leaves = [t.detach().requires_grad_() for t in tensors[:3]]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, tensors[3])


def inference(attend: Attend, tensors: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return attend(*tensors[:3])


def errors_of(
    attend: Attend, tensors: Sequence[Tensor], mask: Tensor
) -> dict[str, tuple[float, float]]:
    """For each result the largest relative error of the first and the last head, and the allowed.

    Rows without a key, which SDPA leaves at 0, are not those of a softmax: they are left out.
    """
    found, exact = training_step(attend, tensors), _exact(tensors[0].device)
    worst = {name: (0.0, 1e-5) for name in NAMES}
    for head in {0, mask.shape[1] - 1}:
        some = mask[0, head].any(-1)
        operands = [t[0, head] for t in tensors]
        queries = [operands[0][some], *operands[1:3], operands[3][some], mask[0, head][some]]
        truth = dense(*queries, exact)
        eager = dense(*queries, tensors[0].dtype) if tensors[0].dtype.itemsize < 4 else None
        for i, name in enumerate(NAMES):
            mine = found[i][0, head][some] if i < 2 else found[i][0, head]
            error, allowed = relative_error(mine, truth[i]), 1e-5
            if eager is not None:
                allowed = 1.1 * relative_error(eager[i], truth[i])
            worst[name] = max(worst[name], (error, allowed), key=lambda pair: pair[0] / pair[1])
    return worst


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cuda" else torch.float64


def rows_of(case: Case, size: Size, args: argparse.Namespace) -> Iterator[Row]:
    """A row for each model and direction, or why there is none."""
    torch._dynamo.reset()
    shape = 1, size.heads, size.n, size.dim
    generator = torch.Generator(size.device).manual_seed(1)
    tensors = [
        torch.randn(shape, device=size.device, generator=generator).to(getattr(torch, args.dtype))
        for _ in range(4)
    ]
    mask = mask_of(case, size, *tensors[:2])
    compiled, rows = models(case, size, mask), []
    for name, attend in compiled.items():
        errors = errors_of(attend, tensors, mask)
        for result, (error, allowed) in errors.items():
            if name != "inductor" and not error <= allowed:
                raise ArithmeticError(f"{name}: {result} is off by {error:.1e} of {allowed:.1e}")
        rows.append({"model": name, "errors": {key: pair[0] for key, pair in errors.items()}})
    for what, call in (("forward", inference), ("step", training_step)):
        runs = {
            name: functools.partial(_finished, call, attend, tensors)
            for name, attend in compiled.items()
        }
        for run in runs.values():
            run()
        clock = time.process_time if args.clock == "cpu" else time.perf_counter
        times = interleaved(runs, clock, args.repeats, args.slow_repeats)
        medians = {name: statistics.median(values) for name, values in times.items()}
        for row in rows:
            row[f"{what}_ms"] = medians[row["model"]]
            row[f"{what}_of_inductor"] = medians[row["model"]] / medians["inductor"]
    density = float(mask.float().mean()) if size.n <= 4096 else None
    yield from ({"pattern": case.name, "n": size.n, "density": density, **row} for row in rows)


def _finished(call: Callable[..., Any], attend: Attend, tensors: Sequence[Tensor]) -> None:
    call(attend, tensors)
    if tensors[0].is_cuda:
        torch.cuda.synchronize()


def line(row: Row) -> str:
    if "error" in row:
        return f"{row['pattern']:15} n={row['n']} {row['error'][:120]}"
    times = (
        f"{what} {row[f'{what}_ms']:9.3f} ms ({row[f'{what}_of_inductor']:5.2f})"
        for what in ("forward", "step")
    )
    return f"{row['pattern']:15} n={row['n']} {row['model']:9} " + "  ".join(times)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--n", type=int, nargs="+", default=[2048], help="multiples of 128")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", nargs="+", default=list(EVERY), choices=list(EVERY))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slow-repeats", type=int, default=3, help="of calls over a second")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a busy machine"
    )
    parser.add_argument("--out", help="path of the JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    args = arguments(argv)
    rows: list[Row] = []
    for n in args.n:
        for name in args.only:
            size = Size(n, args.heads, args.dim, args.device)
            try:
                found = list(rows_of(EVERY[name], size, args))
            except Exception as error:  # one failure must not end the comparison
                found = [{"pattern": name, "n": n, "error": f"{type(error).__name__}: {error}"}]
            rows += found
            print(*map(line, found), sep="\n", flush=True)
            if args.out:
                write_json(args.out, rows, config=vars(args))
    return rows


if __name__ == "__main__":
    main()

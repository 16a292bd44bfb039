"""flash-linear-attention as a peer: its kernels for selected blocks, its selection, its MoBA.

It needs the packages fla-core and einops, unpacked: Triton reads the source of kernels.

    python -m zipfile -e fla_core-0.6.0-py3-none-any.whl peers
    python -m zipfile -e einops-0.8.2-py3-none-any.whl peers
    PYTHONPATH=.:peers python -m benchmarks.selected_peers
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.side_by_side import Call, Problem

#: Heads of queries, of keys, and their width.
Heads = tuple[int, int, int]
#: Keys of a block, and blocks of a query.
KNOWN = ((64, 16), (128, 8))
#: Tokens of the problem by which its autotuner chooses; its keys do not name the length.
TUNED_AT = 16384


def selected(p: Problem) -> Call:
    """Its attention to the selected blocks alone: one list of blocks for each query.

    Its blocks are causal. Repeated numbers would count twice, but lists of ours have none; what a
    list does not use is -1. A list of several queries is repeated for each of them.
    """
    from fla.ops.nsa.parallel import ParallelNSAFunction

    blocks, counts = block_lists(p)
    unit, scale = p.unit_kv, p.scale

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inside = (t.transpose(1, 2) for t in (q, k, v))
        out: Tensor = ParallelNSAFunction.apply(*inside, blocks, counts, unit, scale, None)
        return out.transpose(1, 2)

    return call


def block_lists(p: Problem) -> tuple[Tensor, Tensor]:
    """int32 [1, N, H, S] and [1, N, H]: its lists, of a power of two of places."""
    assert p.lists is not None
    index, count = p.lists
    most = index.shape[3]
    used = torch.arange(most, device=index.device) < count[..., None]
    index = torch.where(used, index, -1)
    places = max(1 << (most - 1).bit_length(), 1)
    index = torch.nn.functional.pad(index, (0, places - most), value=-1)
    n = p.q.shape[2]
    each = [t.repeat_interleave(p.unit_q, 2)[:, :, :n].transpose(1, 2) for t in (index, count)]
    return each[0].contiguous(), each[1].contiguous()


def selection(p: Problem, most: int, unit: int) -> Tensor:
    """Its choice of blocks from means of keys: int32 [1, N, H, most], -1 where there are fewer.

    By the softmax over the means of earlier blocks, summed over the heads of a group; the first
    block, the query's own and the one before it are forced.
    """
    from fla.ops.nsa.parallel import parallel_nsa_topk
    from fla.ops.utils.pooling import mean_pooling

    with torch.no_grad():
        q, k = (t.transpose(1, 2) for t in (p.q, p.k))
        means = mean_pooling(k, unit)
        found: Tensor = parallel_nsa_topk(
            q=q,
            k=means,
            TK=k.shape[1],
            lse=None,
            block_counts=most,
            block_size=unit,
            scale=p.scale,
        )
    return found


def moba(chunk: int, most: int) -> Call:
    """Its MoBA, selection included; it calls FlashAttention 2 and wants equal heads."""
    from fla.ops.moba import parallel_moba

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        lengths = torch.tensor([0, n], dtype=torch.int32, device=q.device)
        inside = (t.transpose(1, 2) for t in (q, k, v))
        out: Tensor = parallel_moba(*inside, lengths, n, chunk, most)
        return out.transpose(1, 2)

    return call


@functools.cache
def prepare(heads: Heads) -> None:
    """Have its autotuner choose for :data:`KNOWN`, once; what it tries is compiled in parallel."""
    import fla.ops.nsa.parallel  # noqa: F401

    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    command = [sys.executable, "-m", "benchmarks.fla_peers", "--heads", *map(str, heads)]
    started = [
        subprocess.Popen(
            [*command, "--part", str(part), str(workers)], cwd=Path(__file__).parents[1]
        )
        for part in range(workers)
    ]
    # What could not be compiled there is compiled here, or fails here.
    for process in started:
        process.wait()
    for unit, most in KNOWN:
        tune(unit, most, heads)


def only_compile(part: int, parts: int) -> None:
    """From here on kernels with an autotuner are compiled, every ``parts``-th, and not run."""
    from triton.runtime.autotuner import Autotuner

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("warmup", None)
        every = self.configs
        self.configs = every[part % len(every) :: parts] if len(every) > 1 else every
        try:
            self.warmup(*args, **kwargs)
        finally:
            self.configs = every

    Autotuner.run = run


def tune(unit: int, most: int, heads: Heads, n: int = TUNED_AT) -> None:
    """Run the forward, the backward and the selection once, for which its autotuner chooses."""
    p = made(n, unit, most, heads)
    inputs = [t.requires_grad_() for t in p.inputs]
    torch.autograd.grad(selected(p)(*inputs), inputs, p.grad_out)
    if unit >= 2 * most and unit <= 64:
        selection(p, most, unit)


def made(n: int, unit: int, most: int, heads: Heads) -> Problem:
    """A problem whose queries select the ``most`` blocks up to their own."""
    q_heads, kv_heads, dim = heads
    shapes = [(1, n, h, dim) for h in (q_heads, kv_heads, kv_heads, q_heads)]
    q, k, v, grad = (torch.randn(s, device="cuda").bfloat16().transpose(1, 2) for s in shapes)
    own = torch.arange(n, device="cuda", dtype=torch.int32)[:, None] // unit
    index = own - torch.arange(most, device="cuda", dtype=torch.int32)
    index = index.expand(1, kv_heads, n, most)
    count = (own[:, 0] + 1).clamp(max=most).expand(1, kv_heads, n).contiguous()
    return Problem(q, k, v, grad, (index.contiguous(), count), 1, unit)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="compile the kernels that its autotuner tries")
    parser.add_argument("--heads", type=int, nargs=3, required=True)
    parser.add_argument("--part", type=int, nargs=2, required=True)
    args = parser.parse_args(argv)
    only_compile(*args.part)
    q_heads, kv_heads, dim = args.heads
    for unit, most in KNOWN:
        tune(unit, most, (q_heads, kv_heads, dim))


if __name__ == "__main__":
    main()

"""One side of :mod:`benchmarks.against`: runs rows with the checkout that stands on its path.

Reads questions, one JSON line each, and answers them likewise. Only public names of the library are
used, and nothing of :mod:`benchmarks` that reaches inside it.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparse_compile
from sparse_compile import patterns as P

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = os.environ.get("AGAINST_SMALL") == "1" or DEVICE == "cpu"
N, HEADS, DIM = (256, 2, 16) if SMALL else (16384, 16, 128)
REPEATS, SAMPLED = (1, 64) if SMALL else (12, 4096)


@dataclass(frozen=True)
class Ready:
    """A row that can be run: kinds of runs by name, and what they computed, sampled."""

    runs: dict[str, Callable[[], Any]]
    results: Callable[[], list[Tensor]]


def grid() -> tuple[int, int]:
    width = 1 << (N.bit_length() - 1) // 2
    return N // width, width


def patterns() -> dict[str, Callable[[], P.Pattern]]:
    ids = functools.partial(torch.arange, N, dtype=torch.int32, device=DEVICE)
    unit = N // 16
    return {
        "causal": lambda: P.Causal() & P.SlidingWindow(N - 2, 0),
        "window": lambda: P.SlidingWindow(unit - 1, 0),
        "longformer": lambda: P.SlidingWindow(unit // 4) | P.Global(N // 256),
        "bigbird": lambda: P.BigBird(64 if N > 4096 else 16, random=3, global_=2, window=3),
        "fixed": lambda: P.Fixed(N // 128, 8 if N > 4096 else 1),
        "strided": lambda: P.Strided(N // 128),
        "dilated": lambda: P.Dilated(unit // 4, 4),
        "blocklocal": lambda: P.BlockLocal(N // 32),
        "axial": lambda: P.Axial(grid()),
        "documents": lambda: P.Documents(ids() // unit) & P.Causal(),
        "neighborhood": lambda: P.Neighborhood(grid(), 13),
        "prefix": lambda: P.PrefixLM(unit),
    }


def operands(heads: int, kv_heads: int, n: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, stored as a projection leaves them."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    made = [
        torch.randn(1, n, h, DIM, device=DEVICE, generator=generator).to(dtype).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads, heads)
    ]
    return [*(t.requires_grad_() for t in made[:3]), made[3]]


def ready(call: Callable[..., Tensor], tensors: list[Tensor]) -> Ready:
    *inputs, grad = tensors
    out = call(*inputs)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, grad, retain_graph=True)

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*inputs)

    runs: dict[str, Callable[[], Any]] = {"forward": forward, "backward": backward}
    return Ready(runs, lambda: [forward(), *backward()])


def of_pattern(make: Callable[[], P.Pattern]) -> Ready:
    mask = make()
    return ready(lambda q, k, v: sparse_compile.attention(q, k, v, mask), operands(HEADS, HEADS, N))


def of_selection(unit_q: int, unit_kv: int, most: int, heads: int, n: int) -> Ready:
    """Random causal selections, as a caller that has the lists passes them."""
    from sparse_compile.selection import canonical

    kv_heads = max(1, heads // 16)
    generator = torch.Generator(DEVICE).manual_seed(1)
    rows = -(-n // unit_q)
    own = torch.arange(rows, device=DEVICE) * unit_q // unit_kv
    shape = (1, kv_heads, rows, most)
    chosen = torch.rand(shape, device=DEVICE, generator=generator) * (own + 1)[:, None]
    index, count = canonical(chosen.long(), -(-n // unit_kv))
    mask = P.Causal() & P.Selected(index, unit_kv, unit_q=unit_q, count=count)
    return ready(
        lambda q, k, v: sparse_compile.attention(q, k, v, mask), operands(heads, kv_heads, n)
    )


def mistral() -> Ready:
    from transformers import MistralConfig, MistralModel

    torch.manual_seed(0)
    hidden, heads, n = (64, 4, 128) if SMALL else (4096, 32, 16384)
    config = MistralConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        head_dim=hidden // heads,
        sliding_window=n // 4,
        max_position_embeddings=n,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device(DEVICE):
        model = MistralModel(config).to(torch.bfloat16 if DEVICE == "cuda" else torch.float32)
        ids = torch.randint(0, 1024, (1, n))
        # The mean square of what a norm gave is constant: its gradient would be rounding alone.
        grad = torch.randn(1, n, hidden).to(model.dtype)
    compiled = torch.compile(model, backend="sparse_compile")

    def forward() -> Tensor:
        with torch.no_grad():
            return compiled(input_ids=ids)[0]

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        compiled(input_ids=ids)[0].backward(grad)
        found = model.layers[0].self_attn.q_proj.weight.grad
        assert found is not None
        return found

    return Ready({"forward": forward, "step": step}, lambda: [forward(), step()])


def rows() -> dict[str, Callable[[], Ready]]:
    n = N if SMALL else 4 * N
    units = (8, 2) if SMALL else (64, 16)
    block = 16 if SMALL else 128
    found: dict[str, Callable[[], Ready]] = {
        name: functools.partial(of_pattern, make) for name, make in patterns().items()
    }
    heads = 16 if SMALL else 64
    each = functools.partial(of_selection, 1, units[0], units[1], heads, n)
    found["selected, each query"] = each
    share = max(1, N // block // 10)
    found["selected, blocks"] = functools.partial(of_selection, block, block, share, HEADS, N)
    found["mistral"] = mistral
    return found


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any]) -> float:
    """Median milliseconds on the device's clock of some runs; the second-level cache is flushed."""
    if DEVICE == "cpu":
        import time

        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    flush = torch.empty(1 << 26, dtype=torch.int32, device=DEVICE)
    run()
    pairs = []
    for _ in range(REPEATS):
        flush.zero_()
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        run()
        pair[1].record()
        pairs.append(pair)
    synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def peak(run: Callable[[], Any]) -> int:
    if DEVICE == "cpu":
        return 0
    synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronize()
    return int(torch.cuda.max_memory_allocated() - held)


def sampled(t: Tensor) -> list[float]:
    flat = t.detach().flatten()
    places = torch.linspace(0, flat.numel() - 1, SAMPLED, dtype=torch.float64).long()
    return [float(x) for x in flat[places.to(flat.device)].float().cpu()]


class Worker:
    """Answers questions about rows."""

    def __init__(self) -> None:
        self.made: dict[str, Ready] = {}

    def names(self, _: Any) -> list[str]:
        return list(rows())

    def prepare(self, name: str) -> list[str]:
        self.made[name] = rows()[name]()
        return list(self.made[name].runs)

    def results(self, name: str) -> list[list[float]]:
        return [sampled(t) for t in self.made[name].results()]

    def time(self, name: str) -> dict[str, float]:
        return {kind: timed(run) for kind, run in self.made[name].runs.items()}

    def peak(self, name: str) -> dict[str, int]:
        return {kind: peak(run) for kind, run in self.made[name].runs.items()}

    def forget(self, name: str) -> None:
        self.made.pop(name, None)
        torch._dynamo.reset()
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand among the answers
    worker = Worker()
    for line in sys.stdin:
        ((verb, argument),) = json.loads(line).items()
        try:
            answer: dict[str, Any] = {"value": getattr(worker, verb)(argument)}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
            answer = {"error": f"{type(error).__name__} at {place}: {str(error)[:500]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

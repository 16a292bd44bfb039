"""A Mistral-shaped transformers model, whole forward and whole training step, side by side.

Peers: torch.compile with Inductor and SDPA; torch.compile with transformers' own flex_attention
path. Outputs of all are compared with each other in the same run, before anything is timed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

from benchmarks.environment import write_json

#: peer -> (attention implementation, backend)
PEERS = {
    "inductor+sdpa": ("sdpa", "inductor"),
    "hf flex_attention": ("flex_attention", "inductor"),
    "sparse_compile": ("sdpa", "sparse_compile"),
}


def build(args: argparse.Namespace, implementation: str) -> nn.Module:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32000,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 7 // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads,
        sliding_window=args.window,
        max_position_embeddings=max(args.n, 4096),
        attn_implementation=implementation,
        use_cache=False,
    )
    with torch.device(args.device):
        model = MistralForCausalLM(config)
    return model.to(torch.bfloat16)


def step(model: Callable[..., Any], ids: Tensor) -> Tensor:
    hidden = model(input_ids=ids)[0]
    hidden.float().square().mean().backward()
    return hidden.detach()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(fn: Callable[[], Any], device: str, repeats: int) -> float:
    """Median milliseconds over ``repeats`` runs, after two warm-up runs."""
    fn()
    fn()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        fn()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def peak_gb(fn: Callable[[], Any], device: str) -> float | None:
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    fn()
    synchronize(device)
    return torch.cuda.max_memory_allocated() / 1e9


def measure(args: argparse.Namespace, peer: str) -> tuple[dict[str, Any], Tensor]:
    implementation, backend = PEERS[peer]
    torch._dynamo.reset()
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    model = build(args, implementation)
    # The body alone: the loss of a language-model head over 32k tokens is not what is compared.
    body = model.model
    options = {"block": tuple(args.block)} if args.block and backend == "sparse_compile" else {}
    compiled = torch.compile(body, backend=backend, options=options)
    ids = torch.randint(0, 32000, (1, args.n), device=args.device)

    def forward() -> Tensor:
        with torch.no_grad():
            return compiled(input_ids=ids)[0]

    def train() -> None:
        body.zero_grad(set_to_none=True)
        step(compiled, ids)

    torch.manual_seed(1)
    ids.copy_(torch.randint(0, 32000, (1, args.n), device=args.device))
    start = time.perf_counter()
    output = forward().float().cpu()
    row: dict[str, Any] = {"peer": peer, "compile_forward_s": time.perf_counter() - start}
    row["forward_ms"] = timed(forward, args.device, args.repeats)
    row["forward_peak_gb"] = peak_gb(forward, args.device)
    train()
    row["step_ms"] = timed(train, args.device, args.repeats)
    row["step_peak_gb"] = peak_gb(train, args.device)
    grad = body.layers[0].self_attn.q_proj.weight.grad.float().cpu()
    row["grad_norm"] = grad.norm().item()
    return row, torch.cat([output.flatten(), grad.flatten() / grad.norm()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--block", type=int, nargs=2, help="block shape of the layouts")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--out", default="mistral.json")
    args = parser.parse_args()
    rows, baseline = [], None
    for peer in args.peers.split(","):
        row, result = measure(args, peer)
        if baseline is None:
            baseline = result
        row["relative_difference_to_first"] = ((result - baseline).norm() / baseline.norm()).item()
        row["forward_speedup"] = (rows[0] if rows else row)["forward_ms"] / row["forward_ms"]
        row["step_speedup"] = (rows[0] if rows else row)["step_ms"] / row["step_ms"]
        rows.append(row)
        print(row, flush=True)
        write_json(args.out, rows, config=vars(args))


if __name__ == "__main__":
    main()

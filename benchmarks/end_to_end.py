"""Whole models whose scores are more than products: forward and training step, side by side.

Peers: torch.compile with Inductor, and transformers' own flex_attention path where it runs. What
each gives is compared with the first of them before it is timed; random weights, bf16.

    python -m benchmarks.end_to_end --only t5,swin --json end_to_end.json
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.environment import write_json

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """A model to measure.

    Attributes:
        build: makes it, for an attention implementation.
        inputs: of a call.
        dense: the implementation that Inductor gets, and we.
        flex: whether transformers' flex_attention knows it.
        trained: whether a training step is timed, too.
    """

    build: Callable[[str], nn.Module]
    inputs: Callable[[], Inputs]
    dense: str = "sdpa"
    flex: bool = True
    trained: bool = True


def _ids(batch: int, n: int) -> Inputs:
    return {"input_ids": torch.randint(5, 1000, (batch, n), device="cuda")}


def _make(kind: str, config: Any) -> nn.Module:
    with torch.device("cuda"):
        return getattr(transformers, kind)(config).to(torch.bfloat16)


def gpt_oss(implementation: str) -> nn.Module:
    config = transformers.GptOssConfig(
        vocab_size=1024,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=4,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        sliding_window=128,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=131072,
        attn_implementation=implementation,
        use_cache=False,
    )
    return _make("GptOssModel", config)


def gemma2(implementation: str) -> nn.Module:
    config = transformers.Gemma2Config(
        vocab_size=1024,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        sliding_window=4096,
        max_position_embeddings=32768,
        attn_implementation=implementation,
        use_cache=False,
    )
    return _make("Gemma2Model", config)


def gemma3(implementation: str) -> nn.Module:
    config = transformers.Gemma3TextConfig(
        vocab_size=1024,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        sliding_window=1024,
        max_position_embeddings=65536,
        attn_implementation=implementation,
        use_cache=False,
    )
    return _make("Gemma3TextModel", config)


def t5(implementation: str) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=1024,
        d_model=768,
        d_kv=64,
        d_ff=3072,
        num_layers=4,
        num_heads=12,
        dropout_rate=0.0,
        attn_implementation=implementation,
    )
    return _make("T5EncoderModel", config)


def swin(implementation: str) -> nn.Module:
    config = transformers.SwinConfig(
        image_size=224,
        patch_size=4,
        embed_dim=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        window_size=7,
        drop_path_rate=0.0,
        attn_implementation=implementation,
    )
    return _make("SwinModel", config)


def modernbert(implementation: str) -> nn.Module:
    config = transformers.ModernBertConfig(
        vocab_size=1024,
        pad_token_id=0,
        cls_token_id=1,
        sep_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
        reference_compile=False,
        attn_implementation=implementation,
    )
    return _make("ModernBertModel", config)


MODELS = {
    "gpt_oss": Model(gpt_oss, lambda: _ids(1, 16384), dense="eager"),
    "gemma2": Model(gemma2, lambda: _ids(1, 16384), dense="eager"),
    "t5": Model(t5, lambda: _ids(1, 8192), flex=False),
    "swin": Model(
        swin,
        lambda: {"pixel_values": torch.randn(64, 3, 224, 224, device="cuda", dtype=torch.bfloat16)},
        flex=False,
    ),
    "modernbert": Model(modernbert, lambda: _ids(8, 8192)),
    "gemma3": Model(gemma3, lambda: _ids(1, 32768)),
}


def milliseconds(call: Callable[[], Any], calls: int = 7) -> list[float]:
    """Of each of some calls, after two that are not counted."""
    found = []
    for number in range(calls + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found += [(time.perf_counter() - began) * 1e3] if number > 1 else []
    return found


def peers_of(model: Model, forced: bool) -> list[tuple[str, str, str]]:
    """Name, attention implementation and backend."""
    found = [
        (f"inductor+{model.dense}", model.dense, "inductor"),
        ("sparse_compile", model.dense, "sparse_compile"),
    ]
    if forced:
        return [("sparse_compile, all rewritten", model.dense, "sparse_compile")]
    return found + ([("hf flex_attention", "flex_attention", "inductor")] if model.flex else [])


def measured(
    model: Model, implementation: str, backend: str, inputs: Inputs, forced: bool
) -> dict[str, Any]:
    """What one peer takes, and what it gives; or why it gives nothing."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    module = model.build(implementation)
    module.train(model.trained)
    options = {"decide": "sparse"} if forced else None
    compiled = torch.compile(module, backend=backend, options=options)
    row: dict[str, Any] = {}

    def forward() -> Tensor:
        with torch.no_grad():
            return compiled(**inputs)[0]

    def step() -> None:
        module.zero_grad(set_to_none=True)
        compiled(**inputs)[0].float().square().mean().backward()

    try:
        began = time.perf_counter()
        row["out"] = forward().float().cpu()
        row["compile_s"] = round(time.perf_counter() - began, 1)
        torch.cuda.reset_peak_memory_stats()
        row["forward_ms"] = milliseconds(forward)
        row["forward_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if model.trained:
            step()
            torch.cuda.reset_peak_memory_stats()
            row["step_ms"] = milliseconds(step, 5)
            row["step_gib"] = torch.cuda.max_memory_allocated() / 2**30
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return row


def compared(name: str, model: Model, forced: bool) -> list[dict[str, Any]]:
    """Every peer on one model; outputs against those of the first one that runs."""
    inputs, rows, truth = model.inputs(), [], None
    for peer, implementation, backend in peers_of(model, forced):
        found = measured(model, implementation, backend, inputs, forced)
        row = {"model": name, "peer": peer, **found}
        out = row.pop("out", None)
        if out is not None:
            truth = out if truth is None else truth
            row["difference"] = float((out - truth).norm() / truth.norm())
        for what in ("forward_ms", "step_ms"):
            if what in row:
                row[what] = round(statistics.median(row[what]), 3)
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default=",".join(MODELS))
    parser.add_argument("--json")
    parser.add_argument("--forced", action="store_true", help="only us, and without a price")
    args = parser.parse_args()
    rows = []
    for name in args.only.split(","):
        rows += compared(name, MODELS[name], args.forced)
        if args.json:
            write_json(args.json, rows, transformers=transformers.__version__)


if __name__ == "__main__":
    main()

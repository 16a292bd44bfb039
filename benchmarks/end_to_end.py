"""Whole models whose scores are more than products: forward and training step, side by side.

Peers: torch.compile with Inductor, over SDPA or, where a model does not have it, eager attention;
and transformers' own flex_attention path where it runs. Random weights, bf16. What each gives,
gradients included, is compared with a run in fp32 before it is timed. GPT-OSS has a single expert,
since rounding alone would choose others and tell nothing about attention.

    python -m benchmarks.end_to_end --only t5 swin --json end_to_end_h200.json

Results are added to those that the file has; each model replaces its own.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks import fp32_attention
from benchmarks.environment import write_json
from benchmarks.together import compared_together
from benchmarks.turns import Turns
from benchmarks.verdicts import verdict
from benchmarks.whole_models import (
    FLEX_WAYS,
    Inputs,
    Peer,
    Problem,
    Row,
    Setting,
    compared,
)


@dataclass(frozen=True)
class Model:
    """A model to measure.

    Attributes:
        kind: its class in transformers; that of its configuration follows from it.
        settings: of its configuration.
        tiny: those that differ where only the benchmark itself is tested.
        batch, n: sequences of a call, and their tokens; or images of n x n.
        dense: the attention implementation that Inductor gets, and we.
        sparse: whether its masks skip much, so that 2.5 times the speed of Inductor over SDPA is to
            be reached. Those of Gemma 2 do not: half of its layers are causal, the others keep 44 %
            of that, and its softcap has no place in SDPA.
    """

    kind: str
    config: str
    settings: dict[str, Any]
    tiny: dict[str, Any]
    batch: int = 1
    n: int = 16384
    dense: str = "sdpa"
    sparse: bool = True
    facts: Row = field(default_factory=dict)

    def build(self, implementation: str, device: str, tiny: bool) -> nn.Module:
        """In fp32, with the same weights each time."""
        settings = self.settings | (self.tiny if tiny else {})
        config = getattr(transformers, self.config)(
            **settings, attn_implementation=implementation, use_cache=False
        )
        torch.manual_seed(0)
        with torch.device(device):
            made: nn.Module = getattr(transformers, self.kind)(config)
        return made

    def inputs(self, device: str, tiny: bool) -> Inputs:
        """Of a call."""
        generator = torch.Generator(device).manual_seed(2)
        given: dict[str, Any] = {"generator": generator, "device": device}
        if self.kind == "SwinModel":
            size, batch = (32, 2) if tiny else (self.n, self.batch)
            pixels = torch.randn(batch, 3, size, size, **given)
            return {"pixel_values": pixels.to(torch.bfloat16)}
        shape = (min(self.batch, 2), 96) if tiny else (self.batch, self.n)
        return {"input_ids": torch.randint(5, 1000, shape, **given)}


_TEXT = {"vocab_size": 1024}
_TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}

MODELS = {
    "gpt_oss": Model(
        "GptOssModel",
        "GptOssConfig",
        {
            **_TEXT,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 4,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "num_local_experts": 1,
            "num_experts_per_tok": 1,
            "max_position_embeddings": 131072,
        },
        _TINY_TEXT,
        dense="eager",
    ),
    "gemma2": Model(
        "Gemma2Model",
        "Gemma2Config",
        {
            **_TEXT,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 4096,
            "max_position_embeddings": 32768,
        },
        _TINY_TEXT,
        dense="eager",
        sparse=False,
    ),
    "t5": Model(
        "T5EncoderModel",
        "T5Config",
        {
            **_TEXT,
            "d_model": 768,
            "d_kv": 64,
            "d_ff": 3072,
            "num_layers": 4,
            "num_heads": 12,
            "dropout_rate": 0.0,
        },
        {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2},
        n=8192,
        sparse=False,
    ),
    "swin": Model(
        "SwinModel",
        "SwinConfig",
        {
            "image_size": 224,
            "patch_size": 4,
            "embed_dim": 128,
            "depths": [2, 2, 18, 2],
            "num_heads": [4, 8, 16, 32],
            "window_size": 7,
            "drop_path_rate": 0.0,
        },
        {
            "image_size": 32,
            "embed_dim": 16,
            "depths": [2, 1],
            "num_heads": [1, 2],
            "window_size": 4,
        },
        batch=64,
        n=224,
        sparse=False,
    ),
    "modernbert": Model(
        "ModernBertModel",
        "ModernBertConfig",
        {
            **_TEXT,
            "pad_token_id": 0,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "reference_compile": False,
        },
        {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "local_attention": 16,
            "global_attn_every_n_layers": 2,
        },
        batch=8,
        n=8192,
    ),
    "gemma3": Model(
        "Gemma3TextModel",
        "Gemma3TextConfig",
        {
            **_TEXT,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 1024,
            "max_position_embeddings": 65536,
        },
        _TINY_TEXT,
        n=32768,
    ),
}


def problem_of(name: str, device: str, tiny: bool, forced: bool = False) -> Problem:
    """A model with its peers."""
    model = MODELS[name]

    def built(implementation: str) -> Callable[[], nn.Module]:
        return functools.partial(model.build, implementation, device, tiny)

    dense, options = built(model.dense), {"decide": "sparse"} if forced else None
    peers = (
        Peer(f"inductor+{model.dense}", dense, "inductor"),
        Peer("sparse_compile", dense, "sparse_compile", options, ours=True),
        Peer("hf flex_attention", built("flex_attention"), "inductor", ways=FLEX_WAYS),
    )
    return Problem(
        name,
        built(fp32_attention.NAME),
        peers,
        model.inputs(device, tiny),
        bars=(1.05, 2.5 if model.sparse else 1.05),
    )


def arguments(words: Sequence[str] | None, names: Sequence[str], doc: str) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=names, default=list(names), metavar="NAME")
    parser.add_argument("--json", help="rows and verdicts are added to this file after each model")
    parser.add_argument("--seconds", type=float, default=280.0, help="for each model")
    parser.add_argument("--calls", type=int, default=7, help="that are timed")
    parser.add_argument("--kernels", type=int, default=0, help="to name, those that take most time")
    parser.add_argument("--jobs", type=int, default=1, help="peers that are prepared at a time")
    parser.add_argument("--turns", default="", help="a file that runs share which share the GPU")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PEER", help="that are left out")
    parser.add_argument("--tiny", action="store_true", help="to test the benchmark itself")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--forced", action="store_true", help="rewrite whatever the price is")
    return parser.parse_args(words)


def measure(args: argparse.Namespace, problem: Callable[..., Problem]) -> list[Row]:
    """Everything that was asked for; the verdicts."""
    setting = Setting(args.device, seconds=args.seconds, calls=args.calls, kernels=args.kernels)
    setting = replace(setting, turns=Turns(args.turns))
    given = args.device, args.tiny, args.forced
    makers = {
        name: functools.partial(_of_some_peers, functools.partial(problem, name, *given), args.skip)
        for name in args.only
    }
    verdicts = []
    for asked, rows in _compared(makers, setting, args.jobs):
        verdicts.append(verdict(asked, rows))
        print(verdicts[-1], flush=True)
        if args.json:
            add_to_json(args.json, asked.name, rows, verdicts[-1])
    return verdicts


def _of_some_peers(make: Callable[[], Problem], skipped: Sequence[str]) -> Problem:
    made = make()
    return replace(made, peers=tuple(peer for peer in made.peers if peer.name not in skipped))


def _compared(
    makers: dict[str, Callable[[], Problem]], setting: Setting, jobs: int
) -> Iterator[tuple[Problem, list[Row]]]:
    """Problems with their rows, which are printed; together if there may be several jobs."""
    note = functools.partial(print, flush=True)
    if jobs > 1:
        yield from compared_together(makers, setting, jobs, note)
        return
    for asked in (make() for make in makers.values()):
        yield asked, compared(asked, setting, note)


def add_to_json(path: str, name: str, rows: list[Row], judged: Row) -> None:
    """Put the rows of a model in the place of those that a file has of it."""
    before = json.loads(Path(path).read_text()) if Path(path).exists() else {}
    kept = [row for row in before.get("rows", []) if row["model"] != name]
    others = [row for row in before.get("verdicts", []) if row["model"] != name]
    more = {"transformers": transformers.__version__, "verdicts": [*others, judged]}
    write_json(path, [*kept, *rows], **more)


def main(words: Sequence[str] | None = None) -> list[Row]:
    """Measure what the command line asks for."""
    fp32_attention.register()
    return measure(arguments(words, list(MODELS), __doc__ or ""), problem_of)


if __name__ == "__main__":
    main()

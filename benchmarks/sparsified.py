"""Models of transformers that are sparse by hand, as they are and sparsified, side by side.

Peers: transformers' own code under Inductor, or eager where Inductor cannot compile it; the
sparsified model under this library's backend, and under Inductor. Random weights, bf16, no dropout;
what each gives, gradients included, is compared with transformers' own code in fp32 before it is
timed. BigBird draws its random blocks in training mode alone, so everything runs in that. The last
peer leaves the attention out: no attention makes these models faster than that.

    python -m benchmarks.sparsified --only longformer_4096 --json sparsified_h200.json

Results are added to those that the file has; each case replaces its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.end_to_end import arguments, measure
from benchmarks.whole_models import Inputs, Peer, Problem, Row
from sparse_compile.integrations.transformers import sparsify

LAYERS = 4
_SIZES = {
    "vocab_size": 1024,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 3072,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_TINY = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
_LONGT5 = {
    "vocab_size": 1024,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_heads": 12,
    "num_layers": LAYERS,
    "local_radius": 127,
    "global_block_size": 16,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
_TINY_LONGT5 = {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 32,
    "num_heads": 2,
    "num_layers": 2,
    "local_radius": 15,
    "global_block_size": 8,
}


@dataclass(frozen=True)
class Model:
    """A model that is sparse by hand.

    Attributes:
        kind, config: its class in transformers, and that of its configuration.
        settings: of its configuration.
        tiny: those that differ where only the benchmark itself is tested.
        length: the setting that says how many tokens it can take, if one does; and how many more
            than there are it has to say.
        marked: whether its first token is global.
        part: of the module, which is measured; empty for all of it.
    """

    kind: str
    config: str
    settings: dict[str, Any]
    tiny: dict[str, Any]
    length: tuple[str, int] | None = None
    marked: bool = False
    part: str = ""

    def build(self, n: int, way: str, device: str, tiny: bool) -> nn.Module:
        """In fp32, with the same weights each time; ``way`` is one of :data:`WAYS`."""
        settings = self.settings | (self.tiny if tiny else {})
        if self.length is not None:
            settings |= {self.length[0]: n + self.length[1]}
        torch.manual_seed(0)
        with torch.device(device):
            config = getattr(transformers, self.config)(**settings)
            whole: nn.Module = getattr(transformers, self.kind)(config)
        made = whole.get_submodule(self.part)
        return WAYS[way](made)

    def inputs(self, batch: int, n: int, device: str) -> Inputs:
        """Of a call; without padding."""
        generator = torch.Generator(device).manual_seed(2)
        ids = torch.randint(5, 1000, (batch, n), generator=generator, device=device)
        found: Inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.marked:
            found["global_attention_mask"] = torch.zeros_like(ids)
            found["global_attention_mask"][:, 0] = 1
        return found


class _Projected(nn.Module):
    """In the place of an attention that is sparsified: the sum of its projections."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention: Any = attention
        self.names = [name for name in _PROJECTIONS if hasattr(attention, name)]

    def forward(self, hidden_states: Tensor, *_: Any, **given: Any) -> tuple[Any, ...]:
        total = sum(getattr(self.attention, name)(hidden_states) for name in self.names)
        if not hasattr(self.attention, "o"):
            return total, None
        # What the layers of LongT5 hand on.
        return self.attention.o(total), hidden_states.new_zeros(1, 1)


def _without_attention(model: nn.Module) -> nn.Module:
    """A model without attention: all the rest of it remains."""
    made = sparsify(model)
    found = [name for name, module in made.named_modules() if module.extra_repr() == _SPARSIFIED]
    for name in found:
        made.set_submodule(name, _Projected(made.get_submodule(name)))
    return made


_SPARSIFIED = "by sparse_compile"
_PROJECTIONS = [
    *("query", "key", "value", "query_global", "key_global", "value_global", "q", "k", "v")
]
#: What is made of a model.
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it is": lambda model: model,
    "sparsified": sparsify,
    "without attention": _without_attention,
}

MODELS = {
    "longformer": Model(
        "LongformerModel",
        "LongformerConfig",
        {**_SIZES, "attention_window": [512] * LAYERS, "sep_token_id": 2, "pad_token_id": 1},
        {**_TINY, "attention_window": [32, 32]},
        ("max_position_embeddings", 2),
        marked=True,
    ),
    "bigbird": Model(
        "BigBirdModel",
        "BigBirdConfig",
        {
            **_SIZES,
            "attention_type": "block_sparse",
            "block_size": 64,
            "num_random_blocks": 3,
        },
        {**_TINY, "block_size": 8, "num_random_blocks": 1},
        ("max_position_embeddings", 0),
    ),
    "led": Model(
        "LEDModel",
        "LEDConfig",
        {
            "vocab_size": 1024,
            "d_model": 768,
            "encoder_layers": LAYERS,
            "encoder_attention_heads": 12,
            "encoder_ffn_dim": 3072,
            "decoder_layers": 1,
            "decoder_attention_heads": 12,
            "decoder_ffn_dim": 3072,
            "attention_window": [1024] * LAYERS,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
        },
        {
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "attention_window": [32, 32],
        },
        ("max_encoder_position_embeddings", 0),
        marked=True,
        part="encoder",
    ),
    "longt5_local": Model(
        "LongT5EncoderModel",
        "LongT5Config",
        {**_LONGT5, "encoder_attention_type": "local"},
        _TINY_LONGT5,
    ),
    "longt5_tglobal": Model(
        "LongT5EncoderModel",
        "LongT5Config",
        {**_LONGT5, "encoder_attention_type": "transient-global"},
        _TINY_LONGT5,
    ),
}
#: Tokens of a sequence, and how many sequences.
LENGTHS = {4096: 8, 16384: 2}
CASES = {f"{model}_{n}": (model, n) for model in MODELS for n in LENGTHS}


def problem_of(name: str, device: str, tiny: bool, forced: bool = False) -> Problem:
    """A case with its peers."""
    (kind, n), options = CASES[name], {"decide": "sparse"} if forced else None
    model, batch = MODELS[kind], LENGTHS[n]
    if tiny:
        n, batch = 96, 2

    def built(way: str) -> Callable[[], nn.Module]:
        return functools.partial(model.build, n, way, device, tiny)

    hf, ours, rest = map(built, WAYS)
    peers = (
        Peer("hf, inductor", hf, "inductor"),
        Peer("hf, eager", hf, after="hf, inductor"),
        Peer("sparsified, sparse_compile", ours, "sparse_compile", options, ours=True),
        Peer("sparsified, inductor", ours, "inductor", ours=True),
        Peer("without attention, inductor", rest, "inductor", limit=True),
    )
    facts = {"n": n, "batch": batch}
    inputs = model.inputs(batch, n, device)
    return Problem(name, hf, peers, inputs, bars=(3.0, 3.0), facts=facts)


def main(words: Sequence[str] | None = None) -> list[Row]:
    """Measure what the command line asks for."""
    return measure(arguments(words, list(CASES), __doc__ or ""), problem_of)


if __name__ == "__main__":
    main()

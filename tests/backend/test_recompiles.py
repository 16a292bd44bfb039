"""Generation compiles no more graphs than with Dynamo alone, whatever the prompts are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from sparse_compile.options import Options
from sparse_compile.passes import pipeline

VOCABULARY, WINDOW, NEW = 32, 16, 256
KINDS: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"sliding_window": WINDOW}),
}


def tiny(kind: str, implementation: str) -> Any:
    config, model, more = KINDS[kind]
    torch.manual_seed(0)
    made = config(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=512,
        eos_token_id=None,
        attn_implementation=implementation,
        **more,
    )
    return model(made).eval()


class Counting:
    """A backend that counts graphs: this library's passes, or nothing but Dynamo."""

    def __init__(self, decide: str | None) -> None:
        self.decide, self.graphs, self.sites = decide, 0, 0

    def __call__(self, gm: Any, inputs: Any) -> Any:
        self.graphs += 1
        if self.decide is None:
            return gm.forward
        self.sites += len(pipeline.run(gm, inputs, Options(decide=self.decide)))
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)


def prompt(length: int, padded: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, VOCABULARY, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, given: dict[str, Tensor], new: int, cache: str) -> Tensor:
    static = {"cache_implementation": "static", "disable_compile": True}
    more = static if cache == "static" else {}
    tokens: Tensor = model.generate(**given, max_new_tokens=new, do_sample=False, **more)
    return tokens


class Generating:
    """A model, with how many graphs it took under some backend."""

    def __init__(self, model: nn.Module, backend: Counting, dynamic: bool | None = None) -> None:
        torch._dynamo.reset()
        self.model, self.backend = model, backend
        self._eager: Callable[..., Any] = model.forward
        self._compiled = torch.compile(model.forward, backend=backend, dynamic=dynamic)

    def check(self, given: dict[str, Tensor], new: int, cache: str) -> None:
        """Generate, with the tokens that eager has."""
        self.model.forward = self._eager
        wanted = generate(self.model, given, new, cache)
        self.model.forward = self._compiled
        assert torch.equal(generate(self.model, given, new, cache), wanted)


@pytest.mark.parametrize(
    ("kind", "implementation", "cache"),
    [
        ("llama", "sdpa", "dynamic"),
        ("mistral", "sdpa", "static"),
        ("mistral", "eager", "dynamic"),
        ("gemma2", "eager", "static"),
    ],
)
def test_generation_compiles_three_graphs_at_most(
    kind: str, implementation: str, cache: str
) -> None:
    backend = Counting("sparse")
    running = Generating(tiny(kind, implementation), backend)
    running.check(prompt(20, 7), NEW, cache)
    assert backend.sites == 2 * backend.graphs
    assert backend.graphs <= 3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("decide", ["sparse", "cost"])
def test_prompts_of_other_lengths_compile_nothing(cache: str, decide: str) -> None:
    """After two, which show Dynamo that lengths change; left padding of every width."""
    backend = Counting(decide)
    running = Generating(tiny("llama", "sdpa"), backend)
    for length in (20, 33):
        running.check(prompt(length, 5), 4, cache)
    before = backend.graphs
    for length in range(7, 47, 2):
        running.check(prompt(length, length // 3), 2, cache)
    assert backend.graphs == before


def test_windows_compile_no_more_than_dynamo_alone() -> None:
    """A cache that starts to slide is another graph to Dynamo itself."""
    graphs = []
    for decide in (None, "sparse"):
        backend = Counting(decide)
        running = Generating(tiny("mistral", "sdpa"), backend)
        for length in (9, 13, 20, 11):
            running.check(prompt(length, 3), 3, "dynamic")
        graphs.append(backend.graphs)
    assert graphs[0] == graphs[1]

"""The Python of the README and of docs/, and what it starts from: small models and tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_compile import patterns as P
from sparse_compile import select

ROOT = Path(__file__).parent.parent
Scope = dict[str, Any]


def blocks(document: str) -> list[str]:
    """The blocks of Python of a document, in order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.S)


class Attention(nn.Module):
    """Causal attention to the 32 keys before, 16 heads of 16; ``mask`` replaces that mask."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            at = torch.arange(x.shape[1])
            mask = (at <= at[:, None]) & (at[:, None] - at < 32)
        q = x.unflatten(-1, (16, 16)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.attn(F.layer_norm(x, x.shape[-1:]), mask)


class Model(nn.Module):
    """Four decoder layers after an encoder, over tokens [B, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 256)
        self.encoder = Layer()
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.encoder(self.embedding(tokens), mask)
        for layer in self.layers:
            x = layer(x)
        return x


def operands(n: int, dim: int = 16, heads: int = 4, kv_heads: int = 2) -> Scope:
    """q [1, heads, n, dim], and k and v of fewer heads."""
    torch.manual_seed(0)
    q = torch.randn(1, heads, n, dim, requires_grad=True)
    k, v = (torch.randn(1, kv_heads, n, dim, requires_grad=True) for _ in range(2))
    return {"torch": torch, "nn": nn, "F": F, "P": P, "n": n, "q": q, "k": k, "v": v}


def model() -> Scope:
    torch.manual_seed(0)
    return {"torch": torch, "model": Model(), "tokens": torch.randint(0, 50, (1, 300))}


def patterns() -> Scope:
    n = 700
    tokens, ids = torch.randint(0, 50, (1, n)), torch.arange(n) // 170
    return {**model(), **operands(n), "tokens": tokens, "ids": ids}


def native_sparse() -> Scope:
    """Windows [..., length, D] are compressed by a learned mean of their keys."""

    class Compress(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(P.NSA().length))

        def forward(self, windows: Tensor) -> Tensor:
            return self.weights.softmax(0) @ windows

    gate = nn.Sequential(nn.Linear(8, 12), nn.Unflatten(-1, (4, 3)))
    scope = {"x": torch.randn(1, 300, 8), "gate": lambda x: gate(x).transpose(1, 2)}
    return {**operands(300), **scope, "compress_k": Compress(), "compress_v": Compress()}


def latent() -> Scope:
    """Two query heads of DeepSeek-V3's latent shape, and an indexer of three heads."""
    scope = operands(200, 576, 2, 1)
    index = {"q_index": torch.randn(1, 3, 200, 8), "k_index": torch.randn(1, 200, 8)}
    return {**scope, **index, "kv": scope.pop("k"), "weights": torch.randn(1, 200, 3)}


def gate_inputs() -> Scope:
    scope = operands(200, 32)
    pairs = [tuple(t.detach() for t in (scope["q"], scope["k"])) for _ in range(2)]
    return {**scope, "attention_inputs": pairs}


def of_transformers() -> Scope:
    from transformers import AutoModelForCausalLM, LongformerConfig, LongformerModel, MistralConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    longer = {"num_attention_heads": 2, "attention_window": 8, "max_position_embeddings": 128}
    return {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "LongformerModel": LongformerModel,
        "config": MistralConfig(**sizes, **heads, sliding_window=16),
        "longformer_config": LongformerConfig(**sizes, **longer, sep_token_id=2),
    }


def flex() -> Scope:
    n = 300
    scope = operands(n, heads=2)
    ids, table = torch.arange(n) // 90, torch.randn(2, 2 * n - 1, requires_grad=True)
    return {**scope, "ids": ids, "table": table}


def follows_the_functions(scope: Scope) -> None:
    q, k, v, ids, table = (scope[name] for name in ("q", "k", "v", "ids", "table"))
    at = torch.arange(scope["n"])
    keep = (ids[:, None] == ids) & (at <= at[:, None])
    bias = table[:, at[:, None] - at + scope["n"] - 1].masked_fill(~keep, -torch.inf)
    close(scope["out"], F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    assert torch.isfinite(torch.autograd.grad(scope["out"].sum(), table)[0]).all()


def compiles(scope: Scope) -> None:
    close(scope["fast"](scope["tokens"]), scope["model"](scope["tokens"]))


def explains(scope: Scope) -> None:
    assert [site.rewritten for site in scope["report"].sites] == [True] * 5


def annotates(scope: Scope) -> None:
    """A restriction of one layer, a promise for the encoder, and a pattern by itself."""
    tokens, ids = scope["tokens"], scope["ids"]
    fast = torch.compile(scope["model"], backend="sparse_compile", options=CHECKED)
    truth = Model()
    truth.load_state_dict(scope["model"].state_dict())
    n, at = scope["n"], torch.arange(scope["n"])
    own = P.heads([P.Strided(128), P.SlidingWindow(255, 0)], per=8).dense(n, n, 1, 16)
    truth.layers[3].attn.forward = lambda x, mask=None: Attention.forward(
        truth.layers[3].attn, x, own & (at <= at[:, None]) & (at[:, None] - at < 32)
    )
    same = ids[:, None] == ids
    close(fast(tokens, same), truth(tokens, same))
    q, k, v = (scope[name][:, :2].detach() for name in "qkv")
    block = torch.compile(scope["Block"](), backend="sparse_compile")
    near = dense({**scope, "q": q, "k": k, "v": v}, P.SlidingWindow(256) | P.Global(64))
    close(block(q, k, v), near)
    close(scope["out"], dense(scope, P.BigBird(block=64, random=3, global_=2, window=3)))
    assert scope["layout"].density > 0


CHECKED = {"check_promises": True}


def selects(scope: Scope) -> None:
    q, k, v = (scope[name] for name in "qkv")
    chosen = select(scope["mask"], q, k).dense(scope["n"], scope["n"])
    keep = chosen.repeat_interleave(2, 1).tril()
    truth = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)
    close(scope["out"], truth)
    differentiable(scope)


def differentiable(scope: Scope) -> None:
    assert torch.isfinite(scope["out"]).all()
    operands = [scope[name] for name in ("q", "k", "v", "kv") if name in scope]
    for grad in torch.autograd.grad(scope["out"].sum(), operands, allow_unused="kv" in scope):
        assert grad is None or torch.isfinite(grad).all()


def dense(scope: Scope, pattern: Any) -> Tensor:
    """What attention under a pattern is, with a mask tensor."""
    n = scope["n"]
    q, k, v = (scope[name] for name in "qkv")
    mask = pattern.dense(n, n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def means_the_same(scope: Scope) -> None:
    tokens = torch.randint(5, 50, (1, 40))
    decoder = scope["decoder"].eval()
    eager = scope["AutoModelForCausalLM"].from_config(scope["config"], attn_implementation="eager")
    eager.load_state_dict(decoder.state_dict())
    close(decoder(tokens).logits, eager.eval()(tokens).logits)
    by_hand = scope["LongformerModel"](scope["longformer_config"]).eval()
    by_hand.load_state_dict(scope["encoder"].state_dict())
    close(scope["encoder"](tokens)[0], by_hand(tokens)[0])


def close(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


def learns(scope: Scope) -> None:
    assert all(p.grad is not None for p in scope["gate"].parameters())


#: For each block of Python of a document: what it starts from, and what must hold after it. A block
#: goes on with the names of the block before it.
Check = Callable[[Scope], None]
SNIPPETS: dict[str, list[tuple[Callable[[], Scope], Check]]] = {
    "README.md": [
        (model, compiles),
        (model, explains),
        (patterns, annotates),
        (lambda: operands(1300), selects),
        (native_sparse, differentiable),
        (latent, differentiable),
        (of_transformers, means_the_same),
        (flex, follows_the_functions),
    ],
    "docs/training-a-gate.md": [(gate_inputs, learns), (lambda: operands(200, 32), selects)],
    "docs/DESIGN.md": [],
}

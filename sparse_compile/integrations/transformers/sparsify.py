"""sparsify: models of transformers that are sparse by hand, computed by this library."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from torch import nn
from transformers.models.big_bird import modeling_big_bird
from transformers.models.led import modeling_led
from transformers.models.longformer import modeling_longformer
from transformers.models.longt5 import modeling_longt5

from sparse_compile.errors import NothingToSparsify
from sparse_compile.integrations.transformers import bigbird, led, longformer, longt5
from sparse_compile.integrations.transformers.refusals import refuse_weights
from sparse_compile.integrations.transformers.windowed import WindowAndGlobal

Model = TypeVar("Model", bound=nn.Module)

#: Classes of transformers, and those that compute the same.
_ATTENTION: dict[type[nn.Module], type[nn.Module]] = {
    modeling_longformer.LongformerSelfAttention: longformer.LongformerSelfAttention,
    modeling_led.LEDEncoderSelfAttention: led.LEDEncoderSelfAttention,
    modeling_big_bird.BigBirdBlockSparseAttention: bigbird.BigBirdBlockSparseAttention,
    modeling_longt5.LongT5LocalAttention: longt5.LongT5LocalAttention,
    modeling_longt5.LongT5TransientGlobalAttention: longt5.LongT5TransientGlobalAttention,
}
#: What holds them and prepares their masks.
_AROUND: dict[type[nn.Module], type[nn.Module]] = {
    modeling_longformer.LongformerModel: longformer.LongformerModel,
    modeling_led.LEDEncoder: led.LEDEncoder,
    modeling_big_bird.BigBirdModel: bigbird.BigBirdModel,
    modeling_longt5.LongT5Stack: longt5.LongT5Stack,
}
#: Those that have dropout on their weights.
_DROPS = (
    WindowAndGlobal,
    longt5.LongT5LocalAttention,
    longt5.LongT5TransientGlobalAttention,
)


def sparsify(model: Model, *, attention_dropout: bool = True) -> Model:
    """Have this library compute the attention that a model of transformers does in chunks.

    For Longformer, the encoders of LED and LongT5, and BigBird with
    ``attention_type="block_sparse"``. Its modules are changed in place: parameters, their names,
    hooks and devices stay, and so do the results on tokens that are no padding, and the gradients.
    Under torch.compile such a model is one graph, with any backend. This library's plans its
    attention as any other; that of LongT5 has biases, and is in the graph as it will run.

    Args:
        model: with any head, or a part of a model.
        attention_dropout: False to train without dropout on attention weights, which never exist;
            otherwise a module that has some raises while it trains.

    Returns:
        the same model.

    Raises:
        NothingToSparsify: it has none of these, or nothing that is not sparsified.
        WeightsNeeded: it is configured to return attention weights.

    >>> from transformers import LongformerConfig, LongformerModel
    >>> config = LongformerConfig(
    ...     vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    ...     intermediate_size=16, attention_window=4, max_position_embeddings=64,
    ... )
    >>> model = sparsify(LongformerModel(config).eval())
    >>> model.encoder.layer[0].attention.self.extra_repr()
    'by sparse_compile'
    """
    found = [module for module in model.modules() if type(module) in _ATTENTION]
    if not found:
        raise NothingToSparsify(
            f"sparse_compile: {type(model).__name__} has no attention to sparsify. Pass a "
            "Longformer, an LED, a LongT5, or a BigBird with attention_type='block_sparse' that is "
            "not sparsified yet. The attention of other models is found by torch.compile(model, "
            "backend='sparse_compile') as it is."
        )
    config = getattr(model, "config", None)
    refuse_weights(model, getattr(config, "output_attentions", False))
    for module in model.modules():
        kind = {**_ATTENTION, **_AROUND}.get(type(module))
        if kind is not None:
            module.__class__ = kind
        if isinstance(module, _DROPS) and not attention_dropout:
            cast(Any, module).dropout = 0.0
    return model

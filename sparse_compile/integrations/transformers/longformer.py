"""Longformer without chunks: the classes of transformers, under their own names.

They hold the same parameters under the same names. Nothing is padded to a multiple of the window,
no mask of all pairs is made, and a graph that torch.compile captures does not break.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.longformer import modeling_longformer as modeling

from sparse_compile.integrations.transformers.refusals import refuse_weights
from sparse_compile.integrations.transformers.windowed import (
    Tokens,
    WindowAndGlobal,
    either,
    through,
)

_OPTIONS = "output_attentions", "output_hidden_states", "return_dict"


class LongformerSelfAttention(WindowAndGlobal, modeling.LongformerSelfAttention):  # type: ignore[misc]
    """See :mod:`sparse_compile.integrations.transformers.windowed`."""


class LongformerModel(modeling.LongformerModel):  # type: ignore[misc]
    """The model without a head."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """As that of the base class, without attention weights."""
        asked = {name: either(options.get(name), getattr(self.config, name)) for name in _OPTIONS}
        refuse_weights(self, asked["output_attentions"])
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give input_ids or inputs_embeds, and not both.")
        if input_ids is not None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        hidden = self.embeddings(
            input_ids=input_ids,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
        )
        marks = attention_mask
        if marks is None:
            marks = torch.ones(hidden.shape[:2], device=hidden.device)
        if global_attention_mask is not None:
            marks = self._merge_to_attention_mask(marks, global_attention_mask)
        keep = asked["output_hidden_states"]
        last, states = through(self.encoder.layer, hidden, Tokens.of(marks), keep)
        pooled = None if self.pooler is None else self.pooler(last)
        if not asked["return_dict"]:
            return (last, pooled) if states is None else (last, pooled, states)
        return modeling.LongformerBaseModelOutputWithPooling(last, pooled, states)

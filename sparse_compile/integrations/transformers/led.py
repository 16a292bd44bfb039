"""LED's encoder without chunks: the classes of transformers, under their own names.

They hold the same parameters under the same names. Nothing is padded to a multiple of the window,
and a graph that torch.compile captures does not break. The decoder stays as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.led import modeling_led as modeling

from sparse_compile.integrations.transformers.refusals import refuse_weights
from sparse_compile.integrations.transformers.windowed import (
    Tokens,
    WindowAndGlobal,
    either,
    through,
)


class LEDEncoderSelfAttention(WindowAndGlobal, modeling.LEDEncoderSelfAttention):  # type: ignore[misc]
    """See :mod:`sparse_compile.integrations.transformers.windowed`."""


class LEDEncoder(modeling.LEDEncoder):  # type: ignore[misc]
    """The encoder."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As that of the base class, without attention weights."""
        refuse_weights(self, either(output_attentions, self.config.output_attentions))
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give input_ids or inputs_embeds, and not both.")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        marks = embeds.new_ones(embeds.shape[:2]) if attention_mask is None else attention_mask
        if global_attention_mask is not None:
            marks = self._merge_to_attention_mask(marks, global_attention_mask)
        hidden = self.layernorm_embedding(embeds + self.embed_positions(embeds.shape[:2]))
        hidden = nn.functional.dropout(hidden, p=self.dropout, training=self.training)
        dropped = self.layerdrop if self.training else 0.0
        keep = either(output_hidden_states, self.config.output_hidden_states)
        last, states = through(self.layers, hidden, Tokens.of(marks), keep, dropped)
        if not either(return_dict, self.config.return_dict):
            return (last,) if states is None else (last, states)
        return modeling.LEDEncoderBaseModelOutput(last, states)

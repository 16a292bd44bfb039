"""A model of the survey: how a small one is built, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Tokens, and how far windows and chunks reach.
LENGTH, WINDOW = 72, 16
#: Tokens of a decoder that an encoder's outputs are read by.
TARGET_LENGTH = 48
BATCH, VOCABULARY = 3, 64
PADDINGS = ("none", "left", "right")
#: The share of tokens that is padding, of each batch entry.
_PADDED = (0, 5 / 72, 21 / 72)
#: The lengths of what is packed into one sequence.
_PACKED = (31, 9, 32)

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A model of the survey.

    Attributes:
        name: as in the table.
        build: makes it, randomly initialised: for an implementation of attention, and without
            dropout or with what it trains with by default.
        inputs: what it is called with, for one of ``paddings``.
        paddings: of its inputs: those of :data:`PADDINGS` and ``"packed"``, sequences one after
            the other with position ids that start anew.
        implementations: of attention, that it has.
        package: where it comes from.
        dropout: whether it is also compiled with dropout.
    """

    name: str
    build: Callable[[str, bool], nn.Module]
    inputs: Callable[[str], Inputs]
    paddings: tuple[str, ...] = PADDINGS
    implementations: tuple[str, ...] = ("eager", "sdpa")
    package: str = "transformers"
    dropout: bool = False


def drawn_anew(model: nn.Module) -> nn.Module:
    """Parameters that start at or near 0, as tables of biases do, are drawn so that all count."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        table = any(word in name for word in ("sinks", "bias_table", "relative_attention_bias"))
        small = parameter.ndim == 2 and parameter.std() < 0.1
        if table or small or not parameter.any() or not parameter.isfinite().all():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(drawn * (1.0 if table else 0.15))
    return model


def kept(padding: str, length: int = LENGTH) -> Tensor:
    """``[batch, length]``, 1 where there is a token."""
    mask = torch.ones(BATCH, length, dtype=torch.int64)
    for row, share in enumerate(_PADDED):
        padded = round(share * length)
        if padding == "left":
            mask[row, :padded] = 0
        elif padding == "right":
            mask[row, length - padded :] = 0
    return mask


def tokens(length: int = LENGTH, batch: int = BATCH) -> Tensor:
    """Random tokens, none of them special."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def noise(*shape: int) -> Tensor:
    """Images, sounds and embeddings."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def text(padding: str) -> Inputs:
    """For a model that reads tokens."""
    if padding == "packed":
        positions = torch.cat([torch.arange(length) for length in _PACKED])
        return {"input_ids": tokens(batch=1), "position_ids": positions[None]}
    mask = {} if padding == "none" else {"attention_mask": kept(padding)}
    return {"input_ids": tokens(), **mask}


def text_to_text(padding: str) -> Inputs:
    """For an encoder and a decoder; what both read is padded."""
    given = {**text(padding), "decoder_input_ids": tokens(TARGET_LENGTH)}
    if padding != "none":
        given["decoder_attention_mask"] = kept(padding, TARGET_LENGTH)
    return given


def sound_to_text(padding: str) -> Inputs:
    """For an encoder of sound, which is never padded, and a decoder."""
    given = {"input_features": noise(BATCH, 8, 2 * LENGTH), "decoder_input_ids": tokens()}
    return given if padding == "none" else {**given, "decoder_attention_mask": kept(padding)}


def image(padding: str) -> Inputs:
    """For a model that reads images, which are not padded."""
    assert padding == "none"
    return {"pixel_values": noise(BATCH, 3, 64, 64)}


def image_and_text(padding: str) -> Inputs:
    """For two encoders; the text is padded."""
    return {**text(padding), **image("none")}

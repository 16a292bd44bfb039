"""BigBird's block-sparse attention: the classes of transformers, under their own names.

Zaheer et al. 2020, https://arxiv.org/abs/2007.14062. They hold the same parameters under the same
names. Nothing is padded, no mask of bands is made, and no weights.
"""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.big_bird import modeling_big_bird as modeling

from sparse_compile.integrations.transformers.bigbird_blocks import Columns, Draw, columns_of
from sparse_compile.integrations.transformers.masked import Allowed, MaskFunction, attend
from sparse_compile.integrations.transformers.refusals import refuse_weights


@dataclass(frozen=True, eq=False)
class Padded:
    """Which tokens are padding; the masks of all layers follow from it.

    Attributes:
        real: bool [B, N], False at padding.
    """

    real: Tensor
    _masks: dict[Draw, MaskFunction] = field(default_factory=dict, repr=False)

    def mask(self, draw: Draw) -> MaskFunction:
        """Who attends to whom among blocks that were drawn."""
        if draw not in self._masks:
            drawn, copied = _columns(draw)
            keys = _with_copies(self.real, 1, draw.block, copied)
            slots = [torch.tensor(slot, device=self.real.device) for slot in drawn]
            self._masks[draw] = MaskFunction(_allowed(self.real, keys, slots, draw))
        return self._masks[draw]


def _allowed(real: Tensor, real_keys: Tensor, slots: list[Tensor], draw: Draw) -> Allowed:
    last = draw.tokens // draw.block - 1

    def allowed(b: Any, h: Any, q: Any, kv: Any) -> Any:
        row, column = q // draw.block, kv // draw.block
        seen = (abs(row - column) <= 1) | (row == 0) | (row == last) | (column == 0)
        seen = (seen & (column <= last)) | (column == last)
        for slot in slots:
            seen = seen | (slot[h if slot.shape[0] > 1 else 0, row] == column)
        return real[b, q] & real_keys[b, kv] & seen

    return allowed


def _with_copies(x: Tensor, dim: int, block: int, copied: list[int]) -> Tensor:
    """Keys, and behind them those of blocks that are attended to once more.

    Args:
        x: of any dtype, with an entry for each token along ``dim``.
        dim: counted from the front.
        block: tokens per block; the last one is filled up with zeros.
        copied: the blocks that are to stand behind the last one.
    """
    tokens = x.shape[dim]
    missing = -tokens % block
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - dim - 1) + (0, missing))
    if not copied:
        return x
    inside = torch.arange(block, device=x.device)
    again = torch.tensor(copied, device=x.device)[:, None] * block + inside
    places = torch.cat([torch.arange(tokens + missing, device=x.device), again.flatten()])
    return x.index_select(dim, places)


def _columns(draw: Draw) -> Columns:
    if torch.compiler.is_compiling():
        constant: Columns = _constant_columns(*dataclasses.astuple(draw))
        return constant
    return columns_of(draw)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_columns(*draw: Any) -> Columns:
    """:func:`columns_of`, as a constant of a graph."""
    return columns_of(Draw(*draw))


class BigBirdBlockSparseAttention(modeling.BigBirdBlockSparseAttention):  # type: ignore[misc]
    """The attention of one layer.

    A query may attend to a random block that it attends to anyway, which changes its weights. To
    keep that, keys stand once more behind the others for each further time.
    """

    def forward(
        self,
        hidden_states: Tensor,
        band_mask: Tensor | None = None,
        from_mask: Tensor | None = None,
        to_mask: Tensor | None = None,
        from_blocked_mask: Tensor | Padded | None = None,
        to_blocked_mask: Tensor | Padded | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention, before its output projection.

        Args:
            hidden_states: [B, N, heads * D].
            band_mask, from_mask, to_mask, to_blocked_mask: not read.
            from_blocked_mask: what is padding; as a tensor, [B, N] in blocks, 0 where a token is.
            **kwargs: ``output_attentions`` must be False.

        Returns:
            [B, N, heads * D], 0 at padding; and no weights.
        """
        refuse_weights(self, kwargs.get("output_attentions"))
        batch, tokens, features = hidden_states.shape
        padded = from_blocked_mask
        if padded is None:
            padded = Padded(hidden_states.new_ones(batch, tokens, dtype=torch.bool))
        elif isinstance(padded, Tensor):
            padded = Padded(padded.reshape(batch, tokens) != 0)
        sizes = batch, tokens, self.num_attention_heads, self.attention_head_size
        q, k, v = (
            projection(hidden_states).view(sizes).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        draw = self._draw(tokens)
        copied = _columns(draw)[1]
        k, v = (_with_copies(x, 2, self.block_size, copied) for x in (k, v))
        out = attend(q, k, v, padded.mask(draw))
        return out.transpose(1, 2).reshape(batch, tokens, features), None

    def _draw(self, tokens: int) -> Draw:
        # Without training nothing is random, and layers can share.
        seed = self.seed if self.training else 0
        # A length that torch.compile would keep symbolic becomes a constant, with a guard.
        whole = operator.index(tokens + -tokens % self.block_size)
        sizes = self.num_attention_heads, whole, self.block_size, self.num_random_blocks
        return Draw(seed, *sizes, self.max_seqlen, self.training)

    def extra_repr(self) -> str:
        """What computes it."""
        return "by sparse_compile"


class BigBirdModel(modeling.BigBirdModel):  # type: ignore[misc]
    """The model without a head."""

    def _pad_to_block_size(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        inputs_embeds: Tensor,
        pad_token_id: int,
    ) -> tuple[Any, ...]:
        """Nothing is padded."""
        return 0, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds

    @staticmethod
    def create_masks_for_block_sparse_attn(
        attention_mask: Tensor, block_size: int
    ) -> tuple[Any, ...]:
        """What is padding, in the place of the first of four masks, for all layers."""
        return Padded(attention_mask != 0), None, None, None

"""register: ``attn_implementation="sparse_compile"`` in models of transformers."""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from sparse_compile.integrations.transformers.attention_interface import attend
from sparse_compile.integrations.transformers.mask_interface import mask

#: What models are asked for.
NAME = "sparse_compile"


def register() -> None:
    """Make ``attn_implementation="sparse_compile"`` known to transformers; again does no harm.

    Importing :mod:`sparse_compile.integrations.transformers` calls it. No mask of all pairs is made
    for such a model: sliding windows, chunks, padding and packed sequences stay functions of
    positions. A softcap of the scores and attention sinks are computed too. Where weights are
    dropped in training, a bias is added or keys are paged, PyTorch's SDPA takes over.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)

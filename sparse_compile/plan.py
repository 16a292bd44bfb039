"""Plan: one attention site, what its mask means, and what will run in its place."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from sparse_compile.indexer_spec import IndexerSpec
from sparse_compile.layout.split_views import Split
from sparse_compile.selected_spec import SelectedSpec
from sparse_compile.site import AttentionSite, LiftedMask, Operand, Scope
from sparse_compile.spec import AttentionSpec


@dataclass(frozen=True)
class Indexer:
    """A top-k over the scores of an indexer, which need not exist.

    Attributes:
        scope: where it stands.
        index: the node of its indices.
        q, k, w: the operands; ``axes`` are among ``b``, ``n`` (queries), ``t`` (keys), ``h``, ``d``
            and, for axes of size one that say nothing, ``1``.
        most: how many keys it keeps.
        lifted: the mask on its scores.
        spec: what it computes.
    """

    scope: Scope
    index: Node
    q: Operand
    k: Operand
    w: Operand
    most: int | Node
    lifted: LiftedMask
    spec: IndexerSpec


@dataclass(frozen=True)
class Plan:
    """The decision for one site.

    Attributes:
        site: the attention.
        lifted: its mask as a predicate.
        spec: what the operators will compute.
        executor: ``"triton"`` or ``"cpu"`` (block-sparse); ``"selected"``: attention over the keys
            that an index names; or ``"sdpa"``: PyTorch's dense kernel without a mask tensor, when
            the mask skips nothing that SDPA does not skip itself.
        causal: for ``"sdpa"``: whether it runs with ``is_causal``.
        reason: why this executor, in one sentence.
        split: the views of its mask, and what they cost; None where they were not weighed.
        selected: for ``"selected"``: what to compute instead of ``spec``.
        indexer: what selects the keys, if that can be computed without the scores of all of them.
    """

    site: AttentionSite
    lifted: LiftedMask
    spec: AttentionSpec
    executor: str
    causal: bool = False
    reason: str = ""
    split: Split | None = None
    selected: SelectedSpec | None = None
    indexer: Indexer | None = None

"""Plan: one attention site, what its mask means, and what will run in its place."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from sparse_compile.layout.views.split_views import Split
from sparse_compile.sites.site import AttentionSite, LiftedMask, ScoringSite
from sparse_compile.spec import AttentionSpec
from sparse_compile.spec.indexer import BlockScoresSpec, IndexerSpec


@dataclass(frozen=True)
class SelectedPlan:
    """What a site attends to besides the static part of its mask.

    Attributes:
        lifted: who may attend to whom among what is selected; disjoint from the static part.
        key: of what selects, see :func:`sparse_compile.ops.selection.selecting_named`; or for lists
            that are given as in :class:`sparse_compile.sites.named.NamedMask`.
        shown: what selects, as a constructor call.
        alone: whether there is no static part.
        units: consecutive queries, and keys, that are selected together.
        given: the tensors that it selects by, where a call passes them.
    """

    lifted: LiftedMask
    key: str
    shown: str
    alone: bool
    units: tuple[int, int]
    given: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Indexer:
    """The decision to compute an indexer without the scores of all keys.

    Attributes:
        site: the indexer, or the scores of blocks or of the attention, of which the best are kept.
        lifted: the mask on its scores.
        spec: what it computes.
    """

    site: ScoringSite
    lifted: LiftedMask
    spec: IndexerSpec | BlockScoresSpec


@dataclass(frozen=True)
class Plan:
    """The decision for one site.

    Attributes:
        site: the attention.
        lifted: its mask as a predicate; where keys are selected, the static part of it, or without
            one what they are selected among.
        spec: what the operators will compute. The tables of what is selected besides stand behind
            those of ``lifted``.
        executor: ``"triton"`` or ``"cpu"`` (block-sparse); ``"selected"``: attention over the keys
            that an index names; or ``"sdpa"``: PyTorch's dense kernel without a mask tensor, when
            the mask skips nothing that SDPA does not skip itself.
        causal: for ``"sdpa"``: whether it runs with ``is_causal``.
        reason: why this executor, in one sentence.
        split: the views of its mask, and what they cost; None where they were not weighed.
        selected: what it attends to besides, where the annotation selects keys.
        indexer: what selects the keys, if that can be computed without the scores of all of them.
    """

    site: AttentionSite
    lifted: LiftedMask
    spec: AttentionSpec
    executor: str
    causal: bool = False
    reason: str = ""
    split: Split | None = None
    selected: SelectedPlan | None = None
    indexer: Indexer | None = None

    @property
    def listed(self) -> AttentionSpec | None:
        """What to compute, where an index of the program names the keys."""
        return self.spec if self.executor == "selected" else None

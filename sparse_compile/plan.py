"""Plan: one attention site, what its mask means, and what will run in its place."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_compile.layout.split_views import Split
from sparse_compile.selected_spec import SelectedSpec
from sparse_compile.site import AttentionSite, LiftedMask
from sparse_compile.spec import AttentionSpec


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
    """

    site: AttentionSite
    lifted: LiftedMask
    spec: AttentionSpec
    executor: str
    causal: bool = False
    reason: str = ""
    split: Split | None = None
    selected: SelectedSpec | None = None

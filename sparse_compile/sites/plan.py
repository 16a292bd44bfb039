"""Plan: what will run in the place of an attention; Trace: all that the passes found out about it.

The pipeline makes traces; others only read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch.fx import Node

from sparse_compile.layout.cost import Candidate
from sparse_compile.layout.views.split_views import Split
from sparse_compile.sites.annotation import Annotation
from sparse_compile.sites.shadow import Shadow
from sparse_compile.sites.site import AttentionSite, LiftedMask, Rejection, ScoringSite
from sparse_compile.spec import AttentionSpec
from sparse_compile.spec.indexer import BlockScoresSpec, IndexerSpec
from sparse_compile.spec.target import Target


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


#: What becomes of an attention: what runs in its place, or why it stays.
Decision = Plan | Rejection


@dataclass(frozen=True)
class Reading:
    """One way to say the mask of an attention, with what its annotation says.

    Attributes:
        mask: who may attend to whom; where keys are selected besides, whatever is selected.
        selected: what is attended to besides, where a pattern selects.
        changed: whether the annotation says more than the program does.
    """

    mask: LiftedMask
    selected: SelectedPlan | None = None
    changed: bool = False


@dataclass(frozen=True)
class Proposal:
    """A way to run an attention.

    Attributes:
        cost: what it is predicted to cost, and why it cannot be, if so.
        decision: the plan; for the program as it is, or a refused way, the rejection it would be.
    """

    cost: Candidate
    decision: Decision


@dataclass(frozen=True)
class Trace:
    """What is known about one attention, pass by pass; later fields are empty until their pass.

    Attributes:
        found: the attention, or why what looked like one is none.
        shadow: what it stands in, if that is a call written out beside itself.
        lifted: its mask, or why it is not understood.
        readings: the mask with the annotation, each way in which it can be said.
        target: the device that it is planned for.
        proposals: every way to run it.
        decision: what was picked.
        seconds: what each pass took.
    """

    found: AttentionSite | Rejection
    shadow: Shadow | None = None
    lifted: LiftedMask | Rejection | None = None
    readings: tuple[Reading, ...] = ()
    target: Target | None = None
    proposals: tuple[Proposal, ...] = ()
    decision: Decision | None = None
    seconds: tuple[tuple[str, float], ...] = field(default=(), compare=False)

    @property
    def decided(self) -> Decision:
        """The decision, once it is made."""
        assert self.decision is not None
        return self.decision

    @property
    def site(self) -> AttentionSite:
        """The attention, where one was found."""
        assert isinstance(self.found, AttentionSite)
        return self.found

    @property
    def where(self) -> tuple[str, ...]:
        """As in :class:`AttentionSite`."""
        return self.found.where

    @property
    def node(self) -> Node | None:
        """The node that the attention computes, or that looked like one."""
        found = self.found
        return found.node if isinstance(found, Rejection) else found.output.node

    @property
    def annotation(self) -> Annotation | None:
        """The innermost pattern that the user attached to this code."""
        return self.found.annotation

    def rejected(self, reason: str, hint: str = "") -> Rejection:
        """The decision to leave it as it is, which is wrong if its annotation says more."""
        note = self.annotation
        restricts = note is not None and not note.promise
        obeyed = bool(self.readings) and not self.readings[0].changed
        unmet = restricts and not obeyed
        return Rejection(reason, hint, self.where, self.node, note, unmet)

    def timed(self, name: str, seconds: float) -> Trace:
        """With what a pass took."""
        return replace(self, seconds=(*self.seconds, (name, seconds)))

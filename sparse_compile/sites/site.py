"""AttentionSite: one attention found in a captured graph; LiftedMask: what its mask means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import sympy
from torch.fx import GraphModule, Node

from sparse_compile.expr import SCORE, MaskExpr, ScoreProgram
from sparse_compile.sites.annotation import Annotation, bound_mask_named
from sparse_compile.sites.named import NamedMask
from sparse_compile.sites.operands import MaskOperand, Operand, Scope
from sparse_compile.spec import EmptyRows
from sparse_compile.spec.indexer import BlockScoresSpec, IndexerSpec


@dataclass(frozen=True)
class Called:
    """The mask of a call of this library's attention.

    Attributes:
        mask: what it is.
        given: the tensors that it selects by.
        sizes: its integers.
    """

    mask: NamedMask
    given: tuple[Node, ...] = ()
    sizes: tuple[int | Node, ...] = ()


@dataclass(frozen=True)
class AttentionSite:
    """One attention in the graph, proven closed: nothing else reads its scores or weights.

    Attributes:
        scope: where it stands.
        output: the node that this attention computes, and the order of its axes.
        q, k, v: the operands, with repeat_kv undone (K and V keep their own number of heads).
        scale: what the scores are multiplied with: a number, or a SymFloat or 0-dim tensor Node.
        kind: ``"sdpa"``, ``"eager"`` or ``"call"`` (of this library's attention).
        causal: SDPA's ``is_causal`` (aligned to the upper left corner).
        masks: the operands of the scores, in the order in which they are applied.
        score_axes: the axes of the score tensor that masks broadcast against, among
            ``("b", "h", "q", "kv")``, ``("b", "q", "kv")``, ``("q", "kv")``, or with ``b1, b2`` or
            ``h1, h2`` for one of them; where an operand does not say otherwise.
        where: source lines in the user's code, innermost last, as ``file.py:12 in forward``.
        region: every node that the rewrite makes dead, in graph order.
        annotation: the innermost pattern that the user attached to this code.
        ranked: why its scores must exist, and what helps, unless the ranking that reads them can do
            without; None where nothing else reads them.
        called: for a call, the mask that it names; None where that is a tensor.
        score: what happens to the scaled products, where that is known to be more than masking, or
            may be: ``w0()`` stands for what the first of ``masks`` adds, and so on.
        sinks: the scores of further columns, which take weight and have no value.
        dropout: the probability of a weight to be dropped.
        zeroed: which weights are made 0: ``"nan"``, those that are NaN; ``"hidden"``, those of a
            query without keys; ``"empty"``, those of a query with all scores -inf; empty: none.
    """

    scope: Scope
    output: Operand
    q: Operand
    k: Operand
    v: Operand
    scale: float | Node
    kind: str
    causal: bool = False
    masks: tuple[MaskOperand, ...] = ()
    score_axes: tuple[str, ...] = ("b", "h", "q", "kv")
    where: tuple[str, ...] = ()
    region: tuple[Node, ...] = field(default=(), repr=False)
    annotation: Annotation | None = None
    ranked: tuple[str, str] | None = None
    score: ScoreProgram | None = None
    sinks: Node | None = None
    called: Called | None = None
    dropout: float = 0.0
    zeroed: str = ""

    @property
    def plain_score(self) -> ScoreProgram | None:
        """What happens to the scores if all that is added to them are masks; None: nothing."""
        if self.score is None:
            return None
        value = self.score.value.xreplace({at: sympy.S.Zero for at in self.score.lookups})
        return None if value == SCORE else ScoreProgram(value)


@dataclass(frozen=True)
class IndexerSite:
    """One indexer in the graph, proven closed: nothing else reads its scores.

    Or an attention's own scores, of which it keeps the best; these have no weights.

    Attributes:
        scores: its scores as those of an attention: where it stands, q and k, its mask, and as the
            output the node of its indices, or with ``reached`` of its values. ``axes`` of operands
            are among ``b``, ``n``, ``h``, ``d`` and, for axes of size one that say nothing, ``1``.
        w: the weights of the heads; without, k may have heads.
        most: how many keys a query keeps.
        spec: what it computes, but for the mask, which is still to be lifted. With ``single``, q
            and k are those before they were made fp32.
        reached: what the scores reach that are kept; None if these are the best ``most``.
    """

    scores: AttentionSite
    w: Operand | None
    most: int | Node
    spec: IndexerSpec
    reached: Reached | None = None


@dataclass(frozen=True)
class BlockScoresSite:
    """The highest score of each block of keys, proven closed: nothing else reads the scores.

    Attributes:
        scores: the scores as those of an attention, as in :class:`IndexerSite`; the output is the
            node of the highest ones. k without ``h`` has one head.
        view: the node of the scores as [B, H, Nq, blocks, size].
        spec: what it computes, but for the mask, which is still to be lifted.
    """

    scores: AttentionSite
    view: Node
    spec: BlockScoresSpec


#: What scores keys, of which an attention keeps the best.
ScoringSite: TypeAlias = IndexerSite | BlockScoresSite


@dataclass(frozen=True)
class Rejection:
    """Why something was left as it was, and what would change that.

    Attributes:
        reason: one sentence a user understands, naming the value that stood in the way.
        hint: what to write instead; may be empty.
        where: as in :class:`AttentionSite`.
        node: the node that looked like attention.
        annotation: as in :class:`AttentionSite`.
        unmet: whether the annotation restricts, so that leaving the program as it was is wrong.
        masks: what hides its scores, as far as that is known where no site was found.
    """

    reason: str
    hint: str = ""
    where: tuple[str, ...] = ()
    node: Node | None = None
    annotation: Annotation | None = None
    unmet: bool = False
    masks: tuple[MaskOperand, ...] = ()


class Refused(Exception):
    """Why an attention, or its mask, must be left alone; becomes a :class:`Rejection`, no error.

    Attributes:
        reason: one sentence for a user.
        hint: what would change that, if anything is known to.
        masks: as in :class:`Rejection`.
    """

    def __init__(self, reason: str, hint: str = "", masks: tuple[MaskOperand, ...] = ()) -> None:
        super().__init__(reason)
        self.reason, self.hint, self.masks = reason, hint, masks

    def at(self, where: tuple[str, ...] = (), node: Node | None = None) -> Rejection:
        """What it says of a node that stands at these source lines."""
        return Rejection(self.reason, self.hint, where, node, masks=self.masks)


@dataclass(frozen=True)
class PatternTable:
    """A table that a pattern makes: once if it is fixed and all sizes are known, else in each call.

    Attributes:
        key: of the mask, see :func:`sparse_compile.sites.annotation.bound_mask_named`.
        index: which of its tables.
        rank: number of dimensions.
        dtype: ``"bool"``, ``"int32"`` or ``"int64"``.
    """

    key: str
    index: int
    rank: int
    dtype: str

    @property
    def fixed(self) -> bool:
        """Whether sizes alone say what it holds."""
        bound = bound_mask_named(self.key)
        return bound is not None and bound.fixed[self.index]


@dataclass(frozen=True)
class DenseTable:
    """A table of bits that is made of a mask tensor in each call.

    Attributes:
        axes: what each axis of the tensor is: ``"b"``, ``"h"``, ``"q"`` or ``"kv"``, or ``""`` for
            one of size one.
        shown: the tensor in words, as ``tensor [1, 1, 4096, 4096]``.
    """

    axes: tuple[str, ...]
    shown: str


@dataclass(frozen=True)
class Reached:
    """That keys are kept whose scores [B, Nq, Nkv] reach the last of a top-k, row by row.

    Attributes:
        values: the values of the top-k.
        comparison: of a score with that value, as ``ge``; or of what is left out, as ``not lt``.
        least: whether the least of the values is meant, wherever it stands.
    """

    values: Node
    comparison: str
    least: bool


@dataclass(frozen=True)
class Ranking:
    """What scores keys, so that the best can be kept.

    Attributes:
        site: an indexer, scores of blocks, or the attention's own; or why it is none of these.
        lifted: the mask on the scores, or why it is not known.
    """

    site: ScoringSite | Rejection
    lifted: LiftedMask | Rejection


@dataclass(frozen=True)
class SelectedKeys:
    """The keys that an index selects for each query, besides what the predicate allows.

    Attributes:
        unit_q, unit_kv: consecutive queries, and keys, that are selected together.
        most: how many units a query selects at most, in words.
        source: the indices of the top-k that the index is, None where it is something else.
        best: the top-k's that the index, or a threshold, is computed from.
        waits: for a threshold on scores instead of an index, which ``most`` but for equal scores
            reach: whether their number is asked of the device in each call.
        reached: for a threshold, what it is if that is known.
        ranking: what scores the keys, of which it keeps the best; None if that is not known.
    """

    unit_q: int
    unit_kv: int
    most: str
    source: Node | None = None
    best: tuple[Node, ...] = ()
    waits: bool | None = None
    reached: Reached | None = None
    ranking: Ranking | None = None

    @property
    def shown(self) -> str:
        """In words, as ``selected: top-k of 8 indices, units of 1 query and 64 keys``."""
        what = f"top-k of {self.most} indices" if self.source else f"{self.most} indices"
        if self.waits is not None:
            what = f"the {self.most} best scores and those that equal the last of them"
        units = [
            f"{unit} {noun}{'s' if unit > 1 and noun == 'key' else ''}"
            for unit, noun in ((self.unit_q, "query"), (self.unit_kv, "key"))
        ]
        asked = "; how many these are is asked of the device in each call" if self.waits else ""
        return f"selected: {what}, units of {' and '.join(units)}{asked}"


class Visited(NamedTuple):
    """What a mask leaves to be visited, for each query.

    Attributes:
        pairs: in blocks that hold an allowed one.
        partial: in those of them that hold a hidden one, too.
    """

    pairs: float
    partial: float


@dataclass(frozen=True)
class Computed:
    """Tensors that a little program computes.

    Attributes:
        program: a functional ATen graph from ``leaves`` to the tensors.
        leaves: as of a :class:`LiftedMask`, and so is ``scope``.
        shown: the tensors in words, as ``tensor [1, 8, 512, 512]``.
    """

    program: GraphModule
    leaves: tuple[Node, ...]
    scope: Scope
    shown: tuple[str, ...]


@dataclass(frozen=True)
class LiftedMask:
    """The meaning of a site's masks, and how to compute the run-time data it reads.

    Attributes:
        mask: the predicate, all mask operands and ``is_causal`` ANDed.
        empty_rows: what a fully masked row yields in the original program. ``ZERO`` also when no
            row can be empty, or where there are ``fallbacks``.
        program: a functional ATen graph from ``leaves`` to ``(*tables, *dense, *sizes)``, and then
            the index and count of ``selection``; None when the mask reads no run-time data beyond
            the lengths.
        leaves: the inputs of ``program``: nodes of ``scope.gm`` or of its parents' graphs.
        scope: where ``program`` can run: the site's scope or one of its parents.
        dense: the tables of ``mask`` after those, of which ``program`` returns the mask tensors
            that they are made of.
        extra: the last tables of ``mask``, which an annotation's pattern makes; ``program`` does
            not return these.
        selection: the keys that an index selects; a query attends to those that ``mask`` allows.
        fills: the scores of masked keys, or what is added to them.
        score: what happens to the scaled products before the mask; None: nothing.
        learned: the tensors ``w0, w1, ...`` that it reads.
        visited: what is visited in the example that was compiled with; None where the mask depends
            on lengths alone, or on values that only a call has.
        unselected: why what an index selects is in ``mask`` instead; empty where nothing is.
        fallbacks: what queries attend to that have no key, which no policy describes: each to keys
            of the first that has some for it, with the ``score`` of that. ``empty_rows`` of the
            last says what those yield that have keys in none.
        otherwise: the same mask with what ``selection`` names in a mask tensor, or why that cannot
            be read; None unless a threshold selects, which can be said either way.
    """

    mask: MaskExpr
    empty_rows: EmptyRows = EmptyRows.ZERO
    program: GraphModule | None = None
    leaves: tuple[Node, ...] = ()
    scope: Scope | None = None
    dense: tuple[DenseTable, ...] = ()
    extra: tuple[PatternTable, ...] = ()
    selection: SelectedKeys | None = None
    unselected: str = ""
    fills: tuple[float, ...] = ()
    score: ScoreProgram | None = None
    learned: Computed | None = None
    visited: Visited | None = None
    fallbacks: tuple[LiftedMask, ...] = ()
    otherwise: LiftedMask | Rejection | None = None

    @property
    def n_lifted_tables(self) -> int:
        """How many tables and mask tensors ``program`` returns."""
        return len(self.mask.tables) - len(self.extra)

    @property
    def reads_tensors(self) -> bool:
        """Whether it reads what may hold other values in the next call."""
        return self.n_lifted_tables > 0 or not all(made.fixed for made in self.extra)

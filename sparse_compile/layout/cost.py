"""What the ways to run an attention cost, predicted from sizes: a pure function.

Predictions only have to rank: each is the time of the host, which does not depend on lengths, and
time that follows the pairs of a query and a key. The rates are measured; where only the ratio of
two matters they were taken side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparse_compile.spec.target import Target


@dataclass(frozen=True)
class Workload:
    """One attention, as far as its cost goes.

    Attributes:
        batch, heads: heads counts query heads.
        n_q, n_kv: lengths.
        features: D + Dv.
        trained: whether its gradients will be computed.
        written_out: whether the program writes its softmax out, so that all scores exist.
        added: elements of what it adds to scores for each pair, as often as they are read.
        made: those of them that it computes for that from less.
        added_trained: those that get gradients.
    """

    batch: int
    heads: int
    n_q: int
    n_kv: int
    features: int
    trained: bool = False
    written_out: bool = False
    added: float = 0.0
    made: float = 0.0
    added_trained: float = 0.0


@dataclass(frozen=True)
class Coverage:
    """What a block-sparse call has to do for its mask.

    Attributes:
        pairs: in visited blocks for each query, weighed as :class:`ViewCost` weighs them.
        looked_up: those of them whose mask is looked up in a tensor of pairs, one by one.
        more: whether a call does more than to start its kernels, see
            :mod:`sparse_compile.codegen.repeated`.
        classes: batch entries and heads that have lists of their own.
        made: which share of a layout is made in each call: 0 where it depends on sizes that do not
            change, 1 where it is made for this attention alone.
        read: elements of mask tensors that are read for it.
        scored: whether scores go through a program.
        distances: whether it learns a tensor by distance.
        learned: pairs, of all heads, for which a gradient is written.
    """

    pairs: float
    classes: int = 1
    made: float = 0.0
    read: int = 0
    looked_up: float = 0.0
    more: bool = False
    scored: bool = False
    distances: bool = False
    learned: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A way to run an attention.

    Attributes:
        name: what it is, as ``"dense"``.
        parts: what takes how many seconds.
        refusal: why it cannot be; empty if it can.
    """

    name: str
    parts: tuple[tuple[str, float], ...]
    refusal: str = ""

    @property
    def seconds(self) -> float:
        """Predicted time of a call, and of its backward if there is one."""
        return sum(seconds for _, seconds in self.parts)

    @property
    def shown(self) -> str:
        """In words.

        >>> Candidate("dense", (("the call", 1e-4), ("4096 pairs per query", 2e-3))).shown
        'dense 2.1 ms (the call 0.1, 4096 pairs per query 2)'
        """
        parts = ", ".join(f"{what} {_ms(seconds)}" for what, seconds in self.parts if seconds)
        return f"{self.name} {_ms(self.seconds)} ms ({parts})"


@dataclass(frozen=True)
class ScoreRates:
    """What it costs that scores are more than products.

    Attributes:
        scored: how many times ``Rates.sparse`` a pair costs whose score goes through a program.
        added: seconds for an element that a dense program adds to a score.
        made: for one that it has to compute for that.
        learned: for a pair whose gradient is written for what was added, dense or sparse.
    """

    scored: float
    added: float = 0.0
    made: float = 0.0
    learned: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Seconds of one core, or of all of an H200.

    Attributes:
        dense_call, sparse_call: of the host, in a call with its backward if there is one.
        more: for a sparse call that does more than to start its kernels.
        layout: for making a layout.
        a_class: for each class of it; with ``class_call`` for calling its kernels.
        read: for an element of a mask tensor.
        dense, sparse: for a pair and a feature.
        row: for a query in visited blocks, in pairs: it is brought there, and its result back.
        written_out: how many times ``dense`` a softmax costs that is written out.
        rows: so many queries cost as much as one.
        keys: so many keys cost a dense call as much as one.
        looked_up: how many times ``sparse`` a pair costs whose mask is looked up.
        scores: of what happens to scores.
    """

    dense_call: float
    sparse_call: float
    more: float
    layout: float
    a_class: float
    class_call: float
    read: float
    dense: float
    sparse: float
    row: int
    written_out: float
    rows: int
    keys: int
    looked_up: float
    scores: ScoreRates


#: By device, and whether gradients are computed. CPU: fp32, one thread, torch 2.13. CUDA: bf16, one
#: H200, 16 heads of 64, torch 2.11: SDPA with a mask tensor; generation with 32 heads of 128.
RATES = {
    ("cpu", False): Rates(
        *(5e-5, 7e-4, 0, 4e-3, 5e-5, 1.5e-4, 1.3e-9),
        *(2.5e-11, 2.4e-11, 128, 1.8, 8, 1, 1.2),
        ScoreRates(4.0),
    ),
    ("cpu", True): Rates(
        *(2.5e-4, 2.2e-3, 0, 4e-3, 5e-5, 5e-4, 1.3e-9),
        *(8.7e-11, 1e-10, 128, 1.4, 8, 1, 1.2),
        ScoreRates(4.0),
    ),
    ("cuda", False): Rates(
        *(1e-4, 1e-4, 2e-4, 1.8e-3, 0, 0, 5e-13),
        *(8.6e-15, 6e-15, 16, 3, 100, 128, 8),
        ScoreRates(2.4, 2.4e-12, 7e-12),
    ),
    ("cuda", True): Rates(
        *(7.5e-4, 7.5e-4, 8e-4, 1.8e-3, 0, 0, 5e-13),
        *(3e-14, 2.1e-14, 16, 3, 100, 128, 5.5),
        ScoreRates(2.2, 2.4e-12, 7e-12, 8e-12),
    ),
}
#: What learning a tensor by distance adds, as a factor.
_LEARNS_DISTANCES = 1.5
#: Multiprocessors of the H200, and how much slower those of other architectures are.
_H200 = 132
_OLDER = {"sm_70": 8.0, "sm_75": 8.0, "sm_80": 2.3, "sm_86": 4.0, "sm_89": 2.5}


#: Of at least so many keys one is kept where lists of single keys cost less than blocks do, by
#: device: measured on the CPU; on a GPU an estimate, for one query head to a key head. There, heads
#: that share keys fill the rows of a tile together.
KEYS_FOR_ONE = {"cpu": 96, "cuda": 64}
_ROWS = 16
#: The same for lists of blocks of keys, or where the scores of all keys need not exist for them.
_UNITS_FOR_ONE = 2


def dense(target: Target, work: Workload) -> Candidate:
    """The program's own attention: every pair, with its mask as a tensor."""
    rates = RATES[target.kind, work.trained]
    factor = rates.written_out if work.written_out else 1
    seconds = _pairs(target, work, max(work.n_kv, rates.keys)) * rates.dense * factor
    what = f"all {work.n_kv} pairs per query"
    bias = work.added * rates.scores.added + work.made * rates.scores.made
    bias += work.added_trained * rates.scores.learned
    parts = ("the call", rates.dense_call), (what, seconds), ("what is added to scores", bias)
    return Candidate("dense", parts)


def blocks(target: Target, work: Workload, coverage: Coverage) -> Candidate:
    """Block-sparse attention."""
    rates = RATES[target.kind, work.trained]
    weighed = coverage.pairs + (rates.looked_up - 1) * coverage.looked_up
    if coverage.scored:
        weighed *= rates.scores.scored * (_LEARNS_DISTANCES if coverage.distances else 1)
    seconds = _pairs(target, work, weighed + rates.row) * rates.sparse
    seconds += coverage.learned * rates.scores.learned
    calls = rates.sparse_call + rates.class_call * (coverage.classes - 1)
    calls += rates.more * coverage.more
    layout = (rates.layout + rates.a_class * coverage.classes) * coverage.made
    read = coverage.read * rates.read * min(1.0, coverage.made)
    return Candidate(
        "block-sparse",
        (
            ("the call", calls),
            ("its layout, made in each call", layout + read),
            (f"{coverage.pairs:.0f} pairs per query", seconds),
        ),
    )


def lists(target: Target, work: Workload, kept: int, refusal: str = "") -> Candidate:
    """Attention over lists of ``kept`` keys per query; no less than this."""
    rates = RATES[target.kind, work.trained]
    seconds = _pairs(target, work, min(kept, work.n_kv)) * rates.sparse
    what = f"{kept} keys per query"
    return Candidate("lists", (("the call", rates.sparse_call), (what, seconds)), refusal)


def sdpa(target: Target, work: Workload) -> Candidate:
    """PyTorch's own kernel without a mask tensor."""
    return replace(dense(target, replace(work, written_out=False)), name="sdpa")


def why_not_listed(
    target: Target, most: int, units: int, unit_kv: int, shared: int, scored: bool
) -> str:
    """That lists hold too many keys to pay, in words; empty if they pay.

    Args:
        target: where the attention runs.
        most: units of keys in a list.
        units: of all keys.
        unit_kv: consecutive keys of a unit.
        shared: query heads that share a key head, and a list.
        scored: whether lists save no scores: they are of single keys and made from all scores, or
            the attention's own scores are ranked, and so computed a second time.
    """
    for_one = _UNITS_FOR_ONE
    if scored:
        rows = 1 if target.kind == "cpu" else min(shared, _ROWS)
        for_one = KEYS_FOR_ONE[target.kind] // rows
    if for_one * most <= units:
        return ""
    what = "keys" if unit_kv == 1 else f"units of {unit_kv} keys"
    kept = f"it keeps {most} of {units} {what}"
    return f"{kept}, and on {target.kind} lists pay from one of {for_one} on"


def cheapest(candidates: Sequence[Candidate]) -> Candidate:
    """The one to take: of equal ones the first.

    >>> cheapest([Candidate("dense", (("", 1.0),)), Candidate("lists", (("", 0.5),), "no")]).name
    'dense'
    """
    return min((c for c in candidates if not c.refusal), key=lambda found: found.seconds)


def _pairs(target: Target, work: Workload, per_query: float) -> float:
    """Pairs times features, as one worker that the rates are of would take them."""
    rows = max(work.n_q, RATES[target.kind, work.trained].rows)
    total = work.batch * work.heads * rows * per_query * work.features
    if target.kind == "cpu":
        return total / max(target.workers, 1)
    return total * _OLDER.get(target.arch, 1.0) * _H200 / max(target.workers, 1)


def _ms(seconds: float) -> str:
    return f"{float(f'{seconds * 1e3:.2g}'):g}"

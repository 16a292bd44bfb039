"""From a ShortKernelSpec to the source text of its kernels: same spec, same bytes."""

from __future__ import annotations

from sparse_compile.codegen.entry import Entry, Kernel
from sparse_compile.codegen.triton.blocks.learned import Looked, looked_up
from sparse_compile.codegen.triton.dropped import dropped
from sparse_compile.codegen.triton.filled import head, precision
from sparse_compile.codegen.triton.score import Scoring
from sparse_compile.codegen.triton.short import text
from sparse_compile.codegen.triton.short.entries import entries_of
from sparse_compile.codegen.triton.short.spec import ShortKernelSpec
from sparse_compile.codegen.triton.text import merge
from sparse_compile.expr import B


def short_kernel(spec: ShortKernelSpec) -> Kernel:
    """The module of a spec: ``forward``, ``backward``, and what merges learned gradients."""
    entries, attention = entries_of(spec), spec.attention
    # What does not change between batch entries stands before the loop over them.
    ahead, behind = (
        Scoring.of(attention, attention.mask, "b", learned) for learned in (False, True)
    )
    helpers = ahead.helpers | behind.helpers
    if attention.dropout is not None:
        helpers |= {"mixed", "stays"}
    parts = head(text.HEADER, spec, ahead.score, helpers)
    for entry in entries:
        if entry.name == "merge_learned":
            parts.append(entry.text(merge.LEARNED))
        elif entry.name == "forward":
            parts.append(_forward(entry, spec, ahead))
        else:
            parts.append(_backward(entry, spec, behind))
    return Kernel(spec.name, "\n\n".join(parts), entries)


def _forward(entry: Entry, spec: ShortKernelSpec, scoring: Scoring) -> str:
    return entry.text(
        text.FORWARD,
        SCORE=list(scoring.score.value),
        DROP=dropped(spec.attention.dropout, "weight"),
        **_shared(spec, scoring),
    )


def _backward(entry: Entry, spec: ShortKernelSpec, scoring: Scoring) -> str:
    looked, dropout = looked_up(spec.attention), spec.attention.dropout
    kept = [] if dropout is None else [f"kept = tl.where(stay, weight * {dropout.factor!r}, 0.0)"]
    holes = _shared(spec, scoring)
    before = [line for one in looked for line in _lines(one, text.SHARED_BEFORE, "")]
    return entry.text(
        text.BACKWARD,
        **{**holes, "BEFORE": [*holes["BEFORE"], *before]},
        SCORE=list(scoring.score.slope),
        DROP=[*dropped(dropout, "grad_weight"), *kept],
        KEPT="kept" if kept else "weight",
        SLOPE=scoring.score.apply_slope,
        LEARNED=[line for one in looked for line in _lines(one, text.SHARED, text.OF_ENTRY)],
        AFTER=[line for one in looked for line in _lines(one, text.SHARED_AFTER, "")],
        BUFFERS=[f"SUM_{one.number}: by {one.lookup}" for one in looked],
    )


def _shared(spec: ShortKernelSpec, scoring: Scoring) -> dict[str, str | list[str]]:
    """The holes that both kernels have."""
    return {
        "FACTOR": scoring.score.factor,
        "BEFORE": scoring.before,
        "MASK": scoring.mask.masking("(kv < n_kv)"),
        "PRECISION": precision(spec),
    }


def _lines(one: Looked, shared: str, of_entry: str) -> list[str]:
    """A template for a lookup, by whether it differs between batch entries."""
    template = of_entry if is_of_entry(one) else shared
    return one.lines(template) if template else []


def is_of_entry(one: Looked) -> bool:
    """Whether a lookup reads another number in each batch entry."""
    return B in one.lookup.free_symbols

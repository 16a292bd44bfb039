"""The parameters of the kernels that hold all of a head."""

from __future__ import annotations

from functools import partial
from typing import Any

from sparse_compile.codegen.entry import (
    Entry,
    Line,
    constants,
    number,
    pointers,
    sizes,
    strides,
)
from sparse_compile.codegen.triton.entries import data_lines, learned_ranks, merge_learned
from sparse_compile.codegen.triton.short.spec import ShortKernelSpec


def entries_of(spec: ShortKernelSpec) -> tuple[Entry, ...]:
    """``forward``, ``backward``, and what adds up the gradients of learned tensors."""
    half, single = partial(pointers, spec.dtype), partial(pointers, "float32")
    given = half("Q", "K", "V")
    by_head = single("LSE")
    read = half("GRAD_OUT")
    gradients = half("GRAD_Q", "GRAD_K", "GRAD_V")
    score = spec.attention.score
    lookups = range(len(score.lookups)) if score else ()
    wanted: dict[str, Any] = {f"WANT_{n}": True for n in lookups}
    forward = _entry("forward", spec, given + half("OUT"), by_head)
    backward = _entry(
        "backward",
        spec,
        given + read + gradients,
        by_head + single("GRAD_LSE", *(f"SUM_{n}" for n in lookups)),
        HAS_GRAD_LSE=True,
        **wanted,
    )
    return (forward, backward, *([merge_learned()] if learned_ranks(score) else []))


def _entry(name: str, spec: ShortKernelSpec, matrices: Line, others: Line, **own: Any) -> Entry:
    """A kernel that is told the strides of some matrices [B, H, N, D]."""
    lines = (
        matrices + others,
        *strides(*(matrix.name for matrix in matrices)),
        sizes("heads", "batch", "each", "n_q", "n_kv") + number("scale"),
        *data_lines(spec.attention),
        *constants(**own),
    )
    return Entry(name, lines, spec.tile.options, spec.tile)

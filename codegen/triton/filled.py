"""How the modules of all families are put together: templates that read their spec."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from sparse_compile.codegen.runtime.generated import fill
from sparse_compile.codegen.triton.entries import learned_ranks, table_ranks
from sparse_compile.codegen.triton.score import PrintedScore
from sparse_compile.codegen.triton.text.common import FEWER_BITS, HELPERS, SOFTMAX_STEP
from sparse_compile.codegen.triton.tile import padded
from sparse_compile.spec import AttentionSpec


def filled(template: str, spec: Any, **holes: str | list[str]) -> str:
    """A template; a hole that is not given is what the spec calls so, in lower case.

    >>> filled("D = $DENOMINATOR  # of $X", 3, X="x")
    'D = 1  # of x'
    """
    names = set(re.findall(r"\$([A-Z_]+)", template)) - set(holes)
    return fill(template, **{name: str(getattr(spec, name.lower())) for name in names}, **holes)


def head(
    template: str, spec: Any, score: PrintedScore, helpers: Iterable[str], **holes: str | list[str]
) -> list[str]:
    """The head of a module for attention, and the small functions that predicates call.

    Args:
        template: of the head.
        spec: of the kernels, with an ``attention``.
        score: of one of them.
        helpers: as in :class:`sparse_compile.codegen.triton.predicate.Printed`.
        holes: of the template, that only it has.
    """
    interpreted = "tile.to(tl.float32)  # the interpreter cannot multiply bfloat16"
    text = filled(
        template,
        spec,
        PROGRAM=[escaped(line) for line in score.shown],
        MASK=escaped(str(spec.attention.mask)),
        WHERE=where(spec),
        SOFTMAX_STEP=SOFTMAX_STEP.splitlines(),
        SYMBOLS=legend(spec.attention),
        HEAD_PAD=str(padded(spec.head_dim)),
        VALUE_PAD=str(padded(spec.value_dim)),
        LOADED=interpreted if spec.arch == "interpreter" else "tile",
        **holes,
    )
    few = spec.dtype == "bfloat16" and spec.arch.startswith("sm_")
    texts = HELPERS | FEWER_BITS if few else HELPERS
    return [text, *(texts[name] for name in sorted(helpers))]


def where(spec: Any) -> list[str]:
    """Lines that say where in the user's code the attention is, and an empty one."""
    return [*(escaped(f"at       {line}") for line in spec.attention.where), ""]


def escaped(text: str) -> str:
    """Text that cannot end the docstring it stands in."""
    return text.replace("\\", "/").replace('"""', "'''")


def legend(attention: AttentionSpec) -> list[str]:
    """Lines that say what the tensors and sizes are that a mask and a score read."""
    mask, dropout = attention.mask, attention.dropout
    lines = [
        f"  {f'w{w}':<12} tensor of the scores, {attention.learned[w]}, {n} dimensions"
        for w, n in learned_ranks(attention.score).items()
    ]
    if dropout is not None:
        lines.append(f"  {f'w{dropout.seed}':<12} seed of the dropout of {dropout.probability:g}")
    lines += [
        f"  {f't{t}':<12} table, {mask.tables[t]}, {n} dimensions"
        for t, n in table_ranks(mask, attention.score).items()
    ]
    return lines + [f"  {f's{i}':<12} size, a run-time integer" for i in range(mask.n_sizes)]


def precision(spec: Any) -> str:
    """What products are told: fp32 is not to be rounded to fewer bits."""
    return ', input_precision="ieee"' if spec.dtype == "float32" else ""

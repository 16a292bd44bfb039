"""scored_attention: attention whose scores look up numbers with gradients, in a captured graph.

Nothing about it is planned: for every backend it is made of the operators that it stands for.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from sparse_compile.codegen.generators import block_shapes
from sparse_compile.expr import MaskExpr, ScoreProgram
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.layout.views.split_views import choose_views
from sparse_compile.ops.composite import defined
from sparse_compile.ops.untraced import untraced

#: q, k, v and the result are [B, H, N, D], and the second result is the log-sum-exp, fp32
#: [B, Hq, Nq]; ``learned`` and ``tables`` are what the score program and the mask read, whose texts
#: are ``score`` and ``mask``.
SCORED_ATTENTION = defined(
    "scored_attention(Tensor q, Tensor k, Tensor v, Tensor[] learned, Tensor[] tables, str mask, "
    "str score, float scale) -> (Tensor, Tensor)"
)

#: Lengths that views are chosen for, which is a matter of cost alone.
_USUAL = ProblemShape(1, 1, 4096, 4096)


@functools.lru_cache(maxsize=64)
@untraced
def scored_specs(mask: str, score: str, device: str) -> tuple[str, str]:
    """The texts of the specs of a layout, and of attention over it.

    Args:
        mask: the text of a :class:`MaskExpr`.
        score: that of a :class:`ScoreProgram`.
        device: the kind of device it is for.
    """
    spec, _ = choose_views(MaskExpr.parse(mask), _USUAL, None, block_shapes(device))
    return spec.text, replace(spec, score=ScoreProgram.parse(score)).text

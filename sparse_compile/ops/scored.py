"""scored_attention: attention whose scores look up numbers with gradients, in a captured graph.

Nothing about it is planned: for every backend it is made of the operators that it stands for.
"""

from __future__ import annotations

from sparse_compile.ops.composite import defined

#: q, k, v and the result are [B, H, N, D], and the second result is the log-sum-exp, fp32
#: [B, Hq, Nq]; ``learned`` and ``tables`` are what the score program and the mask read, whose texts
#: are ``score`` and ``mask``.
SCORED_ATTENTION = defined(
    "scored_attention(Tensor q, Tensor k, Tensor v, Tensor[] learned, Tensor[] tables, str mask, "
    "str score, float scale) -> (Tensor, Tensor)"
)

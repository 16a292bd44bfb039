"""masked_attention: what a call of :func:`sparse_compile.attention` is in a captured graph.

This library's backend finds it like any other attention and plans it for its real sizes; for any
other backend it is made of the operators that it stands for.
"""

from __future__ import annotations

from sparse_compile.ops.composite import defined

_GIVEN = (
    "(Tensor q, Tensor k, Tensor v, Tensor[] given, Tensor? sinks, SymInt[] sizes, str mask, "
    "float scale)"
)

#: q, k, v and the result are [B, H, N, D]; ``given`` are tensors that the mask selects by, or is,
#: or reads; ``sinks`` [Hq] the scores of keys without a value; ``sizes`` the integers of the mask,
#: ``s0, s1, ...``; ``mask`` is the text of a :class:`sparse_compile.sites.named.NamedMask`.
MASKED_ATTENTION = defined(f"masked_attention{_GIVEN} -> Tensor")
#: The same, and the log-sum-exp of the scores, which no pass knows.
MASKED_ATTENTION_AND_LSE = defined(f"masked_attention_and_lse{_GIVEN} -> (Tensor, Tensor)")

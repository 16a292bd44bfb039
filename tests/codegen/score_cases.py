"""Attention problems whose scores are not the scaled products of q and k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import sympy
import torch
from torch import Tensor

from sparse_compile.expr import (
    KV,
    N_KV,
    N_Q,
    SCORE,
    B,
    FloorDiv,
    H,
    MaskExpr,
    Q,
    ScoreProgram,
    learned,
    softcap,
)
from tests.codegen.kernel_cases import CASES as PLAIN
from tests.codegen.kernel_cases import CAUSAL, EVERYTHING, T0, Case, biases, documents

_BY_NAME = {case.name: case for case in PLAIN}
#: ALiBi, whose slope depends on the head: 2 ** -(h + 1).
ALIBI = ScoreProgram(SCORE - sympy.exp(-sympy.log(2.0) * (H + 1)) * (Q - KV))
#: Everything else that a program may be made of; it reads a table that the mask reads, too.
STRANGE = ScoreProgram(
    sympy.Max(SCORE, -1.5) * 0.7
    + sympy.Piecewise((sympy.tanh(SCORE), KV * 2 < N_KV), (sympy.Abs(SCORE), True))
    + 0.25 * T0(B, KV) / (1 + sympy.exp(-SCORE)) ** 2
    - sympy.sqrt(1 + SCORE**2) * 0.1
)

#: Scores that count alike, of which some have gradients.
HALF_MOVED = ScoreProgram(
    sympy.Piecewise((SCORE, sympy.Ne(T0(B, KV), 0) & (KV < Q)), (SCORE / 2, KV < 20), (0, True)),
    absorbed=True,
)

W0, W1, W2, W3, W4 = map(learned, range(5))


def _learned(dtype: str) -> ScoreProgram:
    """A bias of distances, one of keys, one of pairs, and temperatures of queries and of all.

    The last is one number: in half precision its gradient is a matter of luck.
    """
    near, all_pairs = W0(H, KV - Q + N_Q - 1), W4() if dtype == "float32" else sympy.S.Half
    value = SCORE * sympy.exp(W3(Q) / 4) + near + sympy.tanh(W1(B, KV))
    return ScoreProgram(value + W2(H, Q, KV) * all_pairs, (dtype,) * 5)


def _last_keys(case: Case, device: torch.device) -> list[Tensor]:
    """int32 [B]: the last key of each batch entry; one has none."""
    return [torch.arange(case.batch, device=device, dtype=torch.int32) * 40 - 1]


def _by_distance(case: Case, device: torch.device) -> list[Tensor]:
    """[2, Nq + Nkv + 1], for two groups of heads."""
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randn(2, sum(case.n) + 1, generator=generator)
    return [numbers.to(device, case.dtype)]


def _few(*shape: int) -> Callable[[Case, torch.device], list[Tensor]]:
    """One tensor of this shape."""

    def made(case: Case, device: torch.device) -> list[Tensor]:
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        return [numbers.to(device, case.dtype)]

    return made


def _distances(lookup: sympy.Expr) -> ScoreProgram:
    return ScoreProgram(SCORE + lookup, ("float32",))


def _of_blocks(last: sympy.Expr, dtype: str) -> ScoreProgram:
    """Biases by distance, where queries behind ``last`` count as that one, as in LongT5."""
    head = FloorDiv(H, 2)
    near, behind = W0(head, KV - Q + N_Q), W0(head, KV - last + N_Q)
    return ScoreProgram(SCORE + sympy.Piecewise((near, Q <= last), (behind, True)), (dtype,))


CASES = [
    Case("learned", CAUSAL, heads=(4, 2), score=_learned("float32"), learned=biases),
    Case(
        "learned, of some documents",
        MaskExpr((KV <= Q) & sympy.Eq(T0(B, Q), T0(B, KV)), ("int64",)),
        batch=2,
        n=(90, 110),
        tables=documents,
        score=_learned("bfloat16"),
        learned=biases,
        dtype=torch.bfloat16,
    ),
    replace(
        _BY_NAME["strided in two views"], score=_learned("float32"), learned=biases, heads=(2, 1)
    ),
    Case(
        "learned, behind the last block",
        MaskExpr(sympy.Le(KV, T0(B)), ("int32",)),
        heads=(4, 2),
        batch=3,
        n=(70, 69),
        tables=_last_keys,
        score=_of_blocks(T0(B), "float32"),
        learned=_by_distance,
    ),
    Case(
        "learned, behind the last key",
        EVERYTHING,
        heads=(4, 2),
        n=(130, 129),
        score=_of_blocks(N_KV - 1, "bfloat16"),
        learned=_by_distance,
        dtype=torch.bfloat16,
    ),
    Case(
        "learned, apart from keys that the tensor does not have",
        MaskExpr(sympy.Le(KV, T0(B)), ("int32",)),
        heads=(4, 2),
        batch=3,
        n=(70, 69),
        tables=_last_keys,
        score=ScoreProgram(SCORE + W0(FloorDiv(H, 2), KV - T0(B) + 40), ("float32",)),
        learned=_by_distance,
    ),
    # Distances that the tensor does not have count as the nearest that it has.
    Case(
        "learned, nearer than the mask",
        MaskExpr((KV <= Q + 9) & (Q - KV < 50)),
        heads=(4, 2),
        batch=2,
        n=(70, 100),
        score=_distances(W0(H, KV - Q + 7)),
        learned=_few(4, 12),
    ),
    Case(
        "learned, the highest distance first",
        CAUSAL,
        heads=(4, 2),
        batch=2,
        n=(90, 70),
        score=_distances(W0(FloorDiv(H, 2), Q - KV - 20)),
        learned=_few(2, 30),
    ),
    Case(
        "learned, of pairs of distances",
        EVERYTHING,
        n=(70, 75),
        score=_distances(W0(FloorDiv(KV - Q + N_Q, 2))),
        learned=_few(73),
    ),
    Case(
        "learned, for each entry",
        CAUSAL,
        batch=2,
        n=(40, 40),
        score=_distances(W0(B, KV - Q + N_Q - 1)),
        learned=_few(2, 40),
    ),
    Case("dropout", CAUSAL, heads=(4, 2), batch=2, dropout=0.3),
    Case("dropout and biases", CAUSAL, score=_learned("float32"), learned=biases, dropout=0.1),
    Case("even, without gradients", CAUSAL, score=ScoreProgram(sympy.S.Zero, absorbed=True)),
    replace(_BY_NAME["padding"], score=HALF_MOVED, dtype=torch.float32),
    replace(_BY_NAME["strided in two views"], dropout=0.5),
    replace(_BY_NAME["empty rows"], dropout=0.1),
    Case("softcap", CAUSAL, heads=(6, 2), dims=(72, 40), score=softcap(2.0)),
    Case("saturated", EVERYTHING, n=(70, 90), score=softcap(0.3), dtype=torch.float16),
    Case("nearly linear", CAUSAL, heads=(3, 1), score=softcap(50.0)),
    Case("window", MaskExpr((KV <= Q) & (Q - KV < 40)), score=softcap(1.0), dtype=torch.float16),
    replace(_BY_NAME["padding"], score=softcap(3.0), heads=(3, 1)),
    replace(_BY_NAME["empty rows"], score=softcap(3.0)),
    replace(_BY_NAME["strided in two views"], score=softcap(1.5)),
    replace(_BY_NAME["tiles of a grid, and documents"], score=ALIBI),
    replace(_BY_NAME["global tokens, split, after a window"], score=softcap(1.5), heads=(1, 1)),
    Case("negative scale", CAUSAL, n=(60, 60), score=softcap(2.0), scale=-0.3),
    Case("scale of zero", CAUSAL, n=(50, 50), score=softcap(2.0), scale=0.0, heads=(1, 1)),
    Case("position", CAUSAL, heads=(4, 2), score=ALIBI),
    Case(
        "strange",
        MaskExpr((KV <= Q) & sympy.Eq(T0(B, Q), T0(B, KV)), ("int64",)),
        batch=2,
        tables=documents,
        score=STRANGE,
    ),
]

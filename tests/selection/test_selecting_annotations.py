"""mask(module, pattern) with a pattern that selects: the backend selects in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_compile
from sparse_compile import mask
from sparse_compile import patterns as P
from sparse_compile.errors import BadPattern, PatternMisuse, RestrictionFailed
from sparse_compile.inspect.report import Report
from sparse_compile.reference import attention as reference
from tests.selection.test_composition import (
    DOCUMENTS,
    Allowed,
    N,
    Nearest,
    dense_of,
    index,
    operands,
)
from tests.tolerance import relative_error

CHOSEN = P.Selected(index(), unit_kv=16)
PATTERNS = [
    P.Causal() & CHOSEN,
    CHOSEN,
    P.Causal() & CHOSEN | P.SlidingWindow(9),
    DOCUMENTS & P.Causal() & (CHOSEN | P.SlidingWindow(9)),
    P.Causal() | CHOSEN,
    P.SlidingWindow(9) & (P.All() | CHOSEN),
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Sdpa(nn.Module):
    """Calls SDPA with a mask of its own, if it gets one."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=m, is_causal=self.causal, enable_gqa=True
        )


class Eager(nn.Module):
    """Spells softmax attention; a row without keys becomes the mean of V."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor | None = None) -> Tensor:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / 16**0.5
        if m is not None:
            scores = scores.masked_fill(~m, torch.finfo(scores.dtype).min)
        return scores.softmax(-1) @ v


def check(
    run: Callable[..., Tensor], dense: Tensor, *extra: Tensor | None, empty_rows: str = "zero"
) -> None:
    n_q, n_kv = dense.shape[-2:]
    ours = operands(4, 2, n_q, n_kv, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in ours]
    out, (wanted, _) = run(*ours, *extra), reference(*exact, dense, empty_rows=empty_rows)
    assert relative_error(out, wanted) < 1e-5
    weight = torch.randn(out.shape)
    grads = torch.autograd.grad(out, ours, weight)
    wanted_grads = torch.autograd.grad(wanted, exact, weight.double())
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert relative_error(grad, wanted_grad) < 1e-5


def compiled(model: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
    return torch.compile(model, backend="sparse_compile", fullgraph=True, **options)


#: What the pattern is, does not depend on how the attention is written.
PAIRS = [*((number, Sdpa) for number in range(len(PATTERNS))), *((n, Eager) for n in (1, 3, 5))]


@pytest.mark.parametrize(("number", "kind"), PAIRS)
def test_a_module(number: int, kind: type[nn.Module]) -> None:
    pattern = PATTERNS[number]
    model = mask(kind(), pattern)
    check(compiled(model), dense_of(pattern, CHOSEN, 4))
    ours = operands(4, 2, N, N, torch.float32)
    assert torch.equal(model(*ours), kind()(*ours)), "uncompiled code runs as it was"


@pytest.mark.parametrize("pattern", PATTERNS[:4], ids=range(4))
def test_on_top_of_the_programs_own_mask(pattern: P.Pattern) -> None:
    dense = dense_of(pattern, CHOSEN, 4)
    check(compiled(mask(Sdpa(causal=True), pattern)), dense & P.Causal().dense(N, N))
    own = torch.rand(2, 1, N, N) > 0.3
    own[:, :, 3] = False
    check(compiled(mask(Sdpa(), pattern)), dense & own, own)
    keys = torch.rand(2, 1, 1, N) > 0.3
    check(compiled(mask(Sdpa(), pattern)), dense & keys, keys)


@pytest.mark.parametrize("pattern", PATTERNS[:3], ids=range(3))
def test_rows_without_keys_yield_what_the_program_gives_there(pattern: P.Pattern) -> None:
    own = torch.rand(2, 1, N, N) > 0.3
    own[:, :, 3] = False
    dense = dense_of(pattern, CHOSEN, 4) & own
    assert not dense.any(-1).all()
    check(compiled(mask(Eager(), pattern)), dense, own, empty_rows="mean")


def test_a_selection_by_content() -> None:
    nearest = Nearest()
    q, k, _ = operands(4, 2, N, N, torch.float32)
    dense = nearest.select(q, k, None, [], []).dense(N, N).repeat_interleave(2, 1)
    dense = P.Causal().dense(N, N) & dense | P.SlidingWindow(3).dense(N, N)
    check(compiled(mask(Sdpa(), P.Causal() & nearest | P.SlidingWindow(3))), dense)


@pytest.mark.parametrize("static", [None, P.SlidingWindow(3)], ids=repr)
def test_a_selection_can_read_the_programs_own_mask(static: P.Pattern | None) -> None:
    own = torch.rand(2, 1, N, N) > 0.3
    keys = torch.rand(2, 1, 1, N) > 0.3
    pattern = DOCUMENTS & Allowed() if static is None else DOCUMENTS & Allowed() | static
    dense = DOCUMENTS.dense(N, N)
    dense = dense if static is None else dense | static.dense(N, N)
    fast = compiled(mask(Sdpa(), pattern))
    check(fast, (dense & own).expand(2, 4, N, N), own)
    check(fast, (dense & keys).expand(2, 4, N, N), keys)


def test_dynamic_lengths() -> None:
    nearest = Nearest()
    model = mask(Sdpa(), P.Causal() & nearest | P.SlidingWindow(3))
    fast = compiled(model, dynamic=True)
    for n in (40, 56):
        q, k, _ = operands(4, 2, n, n, torch.float32)
        dense = nearest.select(q, k, None, [], []).dense(n, n).repeat_interleave(2, 1)
        check(fast, P.Causal().dense(n, n) & dense | P.SlidingWindow(3).dense(n, n))


def test_new_contents_compile_nothing() -> None:
    numbers = index()
    given = P.Selected(numbers, unit_kv=16)
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = compiled(mask(Sdpa(), P.Causal() & given | DOCUMENTS))
        for shift in (0, 1):
            numbers.copy_(index() - shift)
            check(again, dense_of(P.Causal() & given | DOCUMENTS, given, 4))


def test_layers_with_selections_of_their_own() -> None:
    other = P.Selected(index(most=2), unit_kv=16)
    patterns = [P.Causal() & CHOSEN | P.SlidingWindow(4), P.Causal() & other | P.SlidingWindow(4)]
    layers = nn.ModuleList([mask(Sdpa(), pattern) for pattern in patterns])

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layers[0](q, k, v) + layers[1](q, k, v)

    q, k, v = operands(4, 2, N, N, torch.float32)
    wanted = sum(
        reference(q, k, v, dense_of(pattern, leaf, 4))[0]
        for pattern, leaf in zip(patterns, (CHOSEN, other), strict=True)
    )
    assert isinstance(wanted, Tensor)
    assert relative_error(compiled(run)(q, k, v), wanted) < 1e-5


def test_in_a_checkpoint() -> None:
    pattern = PATTERNS[3]
    model = mask(Sdpa(), pattern)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(model, q, k, v, use_reentrant=False)

    check(compiled(run), dense_of(pattern, CHOSEN, 4))


def test_a_copy_selects_too() -> None:
    pattern = PATTERNS[2]
    model = copy.deepcopy(mask(Sdpa(), pattern))
    check(compiled(model), dense_of(pattern, CHOSEN, 4))


@pytest.mark.parametrize("pattern", PATTERNS[:4], ids=range(4))
def test_explain_says_that_it_is_an_approximation(pattern: P.Pattern) -> None:
    model = mask(Sdpa(), pattern)
    report = sparse_compile.explain(model, *operands(4, 2, N, N, torch.float32))
    (site,) = report.sites
    assert site.rewritten
    assert site.selection == repr(CHOSEN)
    assert "approximated by the keys that" in site.reason
    assert site.annotation is not None
    assert "restrict" in site.annotation
    assert "an approximation" in str(report)
    assert Report.from_json(report.to_json()).sites == report.sites


def test_explain_shows_both_parts_of_the_mask() -> None:
    model = mask(Sdpa(), P.Causal() & CHOSEN | P.SlidingWindow(9, 0))
    (site,) = sparse_compile.explain(model, *operands(4, 2, N, N, torch.float32)).sites
    assert site.mask == "kv <= q and q - kv <= 9 or (selected and kv <= q and q - kv > 9)"
    model = mask(Sdpa(causal=True), CHOSEN)
    (site,) = sparse_compile.explain(model, *operands(4, 2, N, N, torch.float32)).sites
    assert site.mask == "selected and kv <= q"
    assert site.block_density is None


def test_what_cannot_be_rewritten_is_an_error() -> None:
    class Dropping(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, enable_gqa=True)

    model = mask(Dropping(), P.Causal() & CHOSEN)
    with pytest.raises(Exception, match="cannot be honoured") as caught:
        compiled(model)(*operands(4, 2, N, N, torch.float32))
    found = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(found, RestrictionFailed)
    assert "dropout on the weights of selected keys has no kernel" in str(found)


@pytest.mark.parametrize(
    "pattern, promise, message",
    [
        (P.Causal() & CHOSEN, True, "Remove promise=True"),
        (P.Causal() & ~CHOSEN, False, "does not select"),
        (P.heads([CHOSEN, P.Causal()], per=2), False, "made for all heads at once"),
    ],
)
def test_misuse(pattern: P.Pattern, promise: bool, message: str) -> None:
    with pytest.raises((BadPattern, PatternMisuse)) as caught:
        mask(Sdpa(), pattern, promise=promise)
    assert message in str(caught.value)


def test_an_index_that_does_not_fit_is_an_error() -> None:
    model = mask(Sdpa(), P.Causal() & P.Selected(index(n_q=N + 1), unit_kv=16))
    with pytest.raises(Exception, match=r"\[2, heads, 75, selected\]"):
        compiled(model)(*operands(4, 2, N, N, torch.float32))

"""Native Sparse Attention against its dense definition in fp64, forward and all gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import sparse_compile
from sparse_compile import patterns as P
from sparse_compile.api.nsa import native_sparse_attention, nsa_selection
from sparse_compile.errors import BadPattern, BadShape, PatternMisuse
from sparse_compile.ops.nsa import NSA_SELECT
from sparse_compile.reference import attention as reference
from tests.passes.rewritten import Rewritten
from tests.tolerance import relative_error

B, D, DV = 2, 16, 8
SMALL = P.NSA(length=8, stride=4, block=16, k=4, window=20)


def windows_of(tokens: Tensor, pattern: P.NSA) -> list[Tensor]:
    """All whole windows, [B, H, length, D] each."""
    starts = range(0, tokens.shape[2] - pattern.length + 1, pattern.stride)
    return [tokens[:, :, at : at + pattern.length] for at in starts]


def positions(pattern: P.NSA, n_q: int, n_kv: int) -> Tensor:
    return torch.arange(n_q)[:, None] + (n_kv - n_q if pattern.align == "lower_right" else 0)


def past_windows(pattern: P.NSA, n_q: int, n_kv: int) -> Tensor:
    last = torch.arange(pattern.compressed(n_kv)) * pattern.stride + pattern.length - 1
    return last <= positions(pattern, n_q, n_kv)


def naive_blocks(q: Tensor, coarse: Tensor, pattern: P.NSA, n_kv: int, scale: float) -> Any:
    """For each batch entry, key head and query, the selected blocks, by equations 8 to 12."""
    n_q, group = q.shape[2], q.shape[1] // coarse.shape[1]
    scores = q.double() @ coarse.double().repeat_interleave(group, 1).mT * scale
    seen = past_windows(pattern, n_q, n_kv)
    weight = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0)
    blocks, per = -(-n_kv // pattern.block), pattern.block // pattern.stride
    mass = torch.zeros(*q.shape[:3], blocks, dtype=torch.float64)
    for window in range(coarse.shape[2]):
        for cell in range(window, window + pattern.length // pattern.stride):
            mass[..., cell // per] += weight[..., window]
    mass = mass.view(q.shape[0], -1, group, n_q, blocks).sum(2).clamp(min=1e-30)
    place = positions(pattern, n_q, n_kv)[:, 0].tolist()
    return [
        [[_best(row, at, pattern) for row, at in zip(head, place, strict=True)] for head in entry]
        for entry in mass.tolist()
    ]


def _best(mass: list[float], at: int, pattern: P.NSA) -> list[int]:
    own = at // pattern.block
    visible = range(min(own + 1, len(mass)))
    forced = {*range(pattern.sink), *range(own - pattern.local + 1, own + 1)} & {*visible}
    others = sorted((j for j in visible if j not in forced), key=lambda j: (-mass[j], j))
    return sorted([*sorted(forced), *others][: pattern.k])


def dense_definition(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    gates: Sequence[Tensor],
    pattern: P.NSA,
    chosen: Tensor,
    compress: Sequence[Callable[[Tensor], Tensor]],
    scale: float | None = None,
) -> Tensor:
    """The sum of three dense attentions, given what is selected."""
    n_q, n_kv = q.shape[2], keys[0].shape[2]
    place, kv = positions(pattern, n_q, n_kv), torch.arange(n_kv)
    chosen = chosen.repeat_interleave(q.shape[1] // chosen.shape[1], 1) & (kv <= place)
    near = (kv <= place) & (place - kv < pattern.window)
    outs = [
        reference(q, keys[1], values[1], chosen, scale)[0],
        reference(q, keys[2], values[2], near, scale)[0],
    ]
    total = sum(g[..., None] * out for g, out in zip(gates[1:], outs, strict=True))
    if pattern.compressed(n_kv):
        coarse = [
            torch.stack([by(window) for window in windows_of(t, pattern)], 2)
            for by, t in zip(compress, (keys[0], values[0]), strict=True)
        ]
        seen = past_windows(pattern, n_q, n_kv)
        total = total + gates[0][..., None] * reference(q, *coarse, seen, scale)[0]
    assert isinstance(total, Tensor)
    return total


@dataclass(frozen=True)
class Case:
    heads: tuple[int, int] = (4, 2)
    n_q: int = 101
    n_kv: int = 101
    pattern: P.NSA = SMALL
    branches: int = 1
    scale: float | None = None

    def operands(self) -> list[Tensor]:
        """q, the gates, then all keys and all values."""
        generator = torch.Generator().manual_seed(self.n_q)
        key = B, self.heads[1], self.n_kv
        shapes = [(B, self.heads[0], self.n_q, D), (B, self.heads[0], self.n_q, 3)]
        shapes += [(*key, D)] * self.branches + [(*key, DV)] * self.branches
        made = [torch.randn(shape, generator=generator) for shape in shapes]
        made[1] = made[1].sigmoid()
        return [t.requires_grad_() for t in made]

    def of(self, operands: Sequence[Tensor]) -> tuple[Any, Any, Any, Any]:
        """q, k, v and gates as they are passed."""
        q, gates, *rest = operands
        k, v = tuple(rest[: self.branches]), tuple(rest[self.branches :])
        return q, *(t[0] if self.branches == 1 else t for t in (k, v)), gates


def check(case: Case, run: Callable[..., Tensor] = native_sparse_attention) -> None:
    ours = case.operands()
    exact = [t.detach().double().requires_grad_() for t in ours]
    q, k, v, gates = case.of(ours)
    out = run(q, k, v, gates, case.pattern, scale=case.scale)
    first, second = (k, k) if case.branches == 1 else k[:2]
    compress, coarse = (lambda t: t.mean(2),) * 2, first.detach()
    if case.pattern.compressed(case.n_kv):
        coarse = torch.stack([w.mean(2) for w in windows_of(coarse, case.pattern)], 2)
    else:
        coarse = coarse[:, :, :0]
    chosen = nsa_selection(q, second, case.pattern, compressed=coarse, scale=case.scale)
    x, xk, xv, xg = case.of(exact)
    wanted = dense_definition(
        x,
        *((t,) * 3 if case.branches == 1 else t for t in (xk, xv)),
        xg.unbind(-1),
        case.pattern,
        chosen.dense(case.n_q, case.n_kv),
        compress,
        case.scale,
    )
    assert out.shape == wanted.shape
    assert relative_error(out, wanted) < 1e-5
    weight = torch.randn(out.shape)
    grads = torch.autograd.grad(out, ours, weight)
    wanted_grads = torch.autograd.grad(wanted, exact, weight.double())
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert relative_error(grad, wanted_grad) < 1e-5


CASES = [
    Case(),
    Case(heads=(2, 2)),
    Case(heads=(8, 2)),
    Case(heads=(4, 1), n_q=64, n_kv=64),
    Case(branches=3),
    Case(scale=-0.3),
    Case(n_q=5, n_kv=5),
    Case(n_q=8, n_kv=8),
    Case(n_q=1, n_kv=99, pattern=P.NSA(8, 4, 16, 4, window=20, align="lower_right")),
    Case(n_q=30, n_kv=99, pattern=P.NSA(8, 4, 16, 4, window=20, align="lower_right")),
    Case(n_q=99, n_kv=40),
    Case(pattern=P.NSA(8, 8, 48, 3, window=9)),
    Case(pattern=P.NSA(16, 4, 16, 100, sink=0, local=1)),
    Case(n_q=300, n_kv=300, heads=(2, 1), pattern=P.NSA()),
]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_equals_the_dense_definition(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_selects_what_the_paper_says(case: Case) -> None:
    q, k, *_ = case.of(case.operands())
    k = k if case.branches == 1 else k[0]
    found = nsa_selection(q, k, case.pattern, scale=case.scale)
    coarse = torch.stack([w.mean(2) for w in windows_of(k, case.pattern)] or [k[:, :, 0]], 2)
    coarse = coarse[:, :, : case.pattern.compressed(case.n_kv)]
    scale = D**-0.5 if case.scale is None else case.scale
    wanted = naive_blocks(q, coarse, case.pattern, case.n_kv, scale)
    each = case.pattern.block // found.unit_kv
    for b, entry in enumerate(wanted):
        for h, head in enumerate(entry):
            for i, blocks in enumerate(head):
                units = found.index[b, h, i, : found.count[b, h, i]].tolist()
                assert sorted({unit // each for unit in units}) == blocks
    assert not found.index.requires_grad


class Learned(nn.Module):
    """A map of a window with positions, as in the paper."""

    def __init__(self, dim: int, pattern: P.NSA = SMALL) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(pattern.length, dim))
        self.map = nn.Linear(pattern.length * dim, dim)

    def forward(self, windows: Tensor) -> Tensor:
        return self.map((windows + self.position).flatten(-2)).tanh()


@pytest.mark.parametrize("given", [False, True], ids=["by a module", "compressed already"])
def test_a_learned_compression_gets_its_gradient(given: bool) -> None:
    torch.manual_seed(0)
    case, by = Case(), [Learned(D), Learned(DV)]
    exact_by = [Learned(D).double(), Learned(DV).double()]
    for mine, its in zip(by, exact_by, strict=True):
        its.load_state_dict(mine.state_dict())
    ours = case.operands()
    exact = [t.detach().double().requires_grad_() for t in ours]
    q, k, v, gates = case.of(ours)
    how: dict[str, Any] = {"compress": tuple(by)}
    if given:
        windows = (t.unfold(2, SMALL.length, SMALL.stride).mT for t in (k, v))
        how = {"compressed": tuple(m(w) for m, w in zip(by, windows, strict=True))}
    out = native_sparse_attention(q, k, v, gates, SMALL, **how)
    chosen = nsa_selection(q, k, SMALL, compress=by[0])
    x, xk, xv, xg = case.of(exact)
    wanted = dense_definition(
        x,
        (xk,) * 3,
        (xv,) * 3,
        xg.unbind(-1),
        SMALL,
        chosen.dense(case.n_q, case.n_kv),
        exact_by,
    )
    assert relative_error(out, wanted) < 1e-5
    weight = torch.randn(out.shape)
    leaves = [*ours, *by[0].parameters(), *by[1].parameters()]
    exact_leaves = [*exact, *exact_by[0].parameters(), *exact_by[1].parameters()]
    grads = torch.autograd.grad(out, leaves, weight)
    wanted_grads = torch.autograd.grad(wanted, exact_leaves, weight.double())
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert relative_error(grad, wanted_grad) < 1e-5


@pytest.mark.parametrize("backend", ["aot_eager", "sparse_compile"])
def test_compiled(backend: str) -> None:
    torch._dynamo.reset()
    fast = torch.compile(native_sparse_attention, backend=backend, fullgraph=True)
    check(Case(), fast)


def test_compiled_with_settings_of_the_code_and_dynamic_lengths() -> None:
    torch._dynamo.reset()

    def run(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, _: P.NSA, scale: Any) -> Tensor:
        pattern = P.NSA(length=8, stride=4, block=16, k=4, window=20, align="lower_right")
        return native_sparse_attention(q, k, v, gates, pattern, scale=scale)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    late = P.NSA(8, 4, 16, 4, window=20, align="lower_right")
    for lengths in ((70, 99), (70, 120), (71, 150)):
        check(Case((4, 2), *lengths, pattern=late), fast)
    assert counter.frame_count == 1


def test_a_selection_is_used_again() -> None:
    case = Case()
    q, k, v, gates = case.of(case.operands())
    chosen = nsa_selection(q, k, SMALL)
    given = native_sparse_attention(q, k, v, gates, SMALL, selection=chosen)
    assert torch.equal(given, native_sparse_attention(q, k, v, gates, SMALL))
    other = native_sparse_attention(q, k, v, gates, SMALL, selection=nsa_selection(-q, k, SMALL))
    assert not torch.equal(given, other)


def test_layers_of_compiled_code_share_a_selection() -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        keys, values = k.unfold(2, 8, 4).mean(-1), v.unfold(2, 8, 4).amax(-1)
        chosen = nsa_selection(q, k, SMALL, compressed=keys)
        for _ in range(2):
            more = native_sparse_attention(
                q, k, v, gates, SMALL, compressed=(keys, values), selection=chosen
            )
            q = q + more.repeat(1, 1, 1, 2)
        return q

    case, program = Case(), Rewritten()
    given = case.of(case.operands())
    torch.testing.assert_close(program.compiled(layers)(*given), layers(*given))
    called = program.targets()
    assert called.count("sparse_compile.nsa_select.default") == 1
    assert called.count("sparse_compile.attention.default") == 2 * 3  # three a layer
    assert program.squares(case.n_q) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    case = Case()
    ours = [t.detach().to(dtype).requires_grad_() for t in case.operands()]
    q, k, v, gates = case.of(ours)
    out = native_sparse_attention(q, k, v, gates.float(), SMALL)
    assert out.dtype == dtype
    chosen = nsa_selection(q, k, SMALL).dense(case.n_q, case.n_kv)
    x, xk, xv, xg = case.of([t.double() for t in ours])
    means = (lambda t: t.mean(2),) * 2
    wanted = dense_definition(x, (xk,) * 3, (xv,) * 3, xg.unbind(-1), SMALL, chosen, means)
    assert relative_error(out, wanted) < 1e-2


def test_gates_in_parts_and_queries_that_see_nothing_compressed() -> None:
    case = Case()
    q, k, v, gates = case.of(case.operands())
    parts = gates.unbind(-1)
    out = native_sparse_attention(q, k, v, gates, SMALL)
    assert torch.equal(native_sparse_attention(q, k, v, parts, SMALL), out)
    nothing = torch.zeros_like(parts[0])
    compressed = native_sparse_attention(q, k, v, (parts[0], nothing, nothing), SMALL)
    assert not compressed[:, :, : SMALL.length - 1].any()
    assert compressed[:, :, SMALL.length - 1 :].any(-1).all()


def test_operator_fits_torch() -> None:
    q, k, *_ = Case().of(Case().operands())
    coarse = k.unfold(2, 8, 4).mean(-1).detach()
    for settings in ([16, 16, 4, 8, 4, 1, 2], [16, 48, 3, 8, 4, 0, 0]):
        args = (q.detach(), k.detach(), coarse, settings, "upper_left", 0.25)
        torch.library.opcheck(NSA_SELECT, args)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gates": torch.zeros(B, 4, 101, 2)}, r"Pass one of \[2, 4, 101, 3\], or three of"),
        ({"gates": (torch.zeros(B, 4, 101),) * 2}, "got gates"),
        ({"gates": torch.zeros(B, 4, 101)}, "got gates"),
        ({"pattern": P.NSASelection()}, r"Write patterns.NSA\(...\)"),
        ({"compress": lambda w: w}, "one for each window of 8 keys, which start 4 apart"),
        ({"compressed": (torch.zeros(B, 2, 3, D),) * 2}, r"Return or pass \[2, 2, 24, 16\]"),
        ({"compress": torch.sum, "compressed": ()}, "got both compress and compressed"),
        ({"k": (torch.zeros(B, 2, 101, D),) * 2}, "got 2 tensors of keys"),
        ({"k": torch.zeros(B, 3, 101, D), "v": torch.zeros(B, 3, 101, D)}, "4 query heads cannot"),
        ({"k": torch.zeros(B, 2, 99, D)}, "Pass the same batch, heads and length for all"),
    ],
)
def test_mistakes(change: dict[str, Any], message: str) -> None:
    q, k, v, gates = Case().of(Case().operands())
    call = {"q": q, "k": k, "v": v, "gates": gates, "pattern": SMALL, **change}
    with pytest.raises((BadShape, PatternMisuse), match=message):
        native_sparse_attention(**call)


def test_it_is_no_mask() -> None:
    q, k, v, _ = Case().of(Case().operands())
    mask: Any = SMALL
    with pytest.raises(PatternMisuse, match="native_sparse_attention"):
        sparse_compile.attention(q, k, v, mask)
    with pytest.raises(PatternMisuse, match="Call nsa_selection"):
        sparse_compile.select(mask, q, k)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"window": 1}, "NSA: window is 1. Write 2 or more"),
        ({"length": 24, "stride": 16}, "not a multiple of the stride 16"),
        ({"block": 40}, "which its stride does not divide"),
        ({"k": 2}, "force 3 blocks"),
        ({"align": "left"}, "align"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadPattern, match=message):
        P.NSA(**settings)

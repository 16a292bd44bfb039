"""Masks and orders whose layouts a device must build as the CPU does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from sparse_compile.codegen.triton.layout.build import DeviceProblem, has_room
from sparse_compile.expr import KV, B, FloorDiv, FloorMod, H, MaskExpr, Q, size_symbol, table
from sparse_compile.layout.block_layout import BlockLists
from sparse_compile.layout.build import build_layout
from sparse_compile.layout.superset import Problem, ProblemShape
from sparse_compile.spec.view import Order, natural

S0 = size_symbol(0)
DOCS, PADDING, WINDOWS, SCALAR, PAIRS = (table(i) for i in range(5))
DTYPES = ("int64", "bool", "int32", "int64", "int32")
CAUSAL = KV <= Q
DOCUMENTS = sympy.Eq(DOCS(B, Q), DOCS(B, KV))


EIGHT = natural(8)


@dataclass(frozen=True)
class DeviceCase:
    """A mask, with the run-time data that it reads, over some lengths and orders."""

    name: str
    predicate: Any
    n_q: int = 35
    n_kv: int = 35
    q: Order = EIGHT
    kv: Order = EIGHT
    batch: int = 2
    heads: int = 2
    size: int = 13
    span: int | None = 4

    def __str__(self) -> str:
        return self.name

    @property
    def mask(self) -> MaskExpr:
        return MaskExpr(self.predicate, DTYPES, 1)

    def tables(self, device: torch.device) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        n = max(self.n_q, self.n_kv)

        def numbers(high: int, *shape: int) -> Tensor:
            return torch.randint(0, high, shape, generator=generator)

        documents = numbers(n // 12 + 2, self.batch, n).sort(-1)[0]
        padding = torch.arange(n)[None] < numbers(n + 1, self.batch, 1)
        windows = numbers(n, self.heads).to(torch.int32)
        # Pairs of chunks: along both coordinates.
        pairs = numbers(2, -(-n // 16), -(-n // 16)).to(torch.int32)
        found = [documents, padding, windows, torch.tensor(11), pairs]
        return [entry.to(device) for entry in found]


def residues(period: int, block: int) -> Order:
    return Order((block, 1), (period,), (1, 0))


#: Number of keys.
N = sympy.Symbol("n_kv", integer=True, positive=True)
TILES = Order((4, 4), (8,), (0, 1))
BOXES = Order((1, 2, 4), (4, 8), (0, 2, 1))


def near(a: Any, b: Any, distance: int) -> Any:
    return sympy.Abs(a - b) <= distance


def on_grid(distance: int, unit: int, period: int | None = None) -> Any:
    """Whether one digit of the query is near that of the key."""
    digits = [FloorDiv(x, unit) for x in (Q, KV)]
    return near(*(FloorMod(d, period) if period else d for d in digits), distance)


CASES = [
    DeviceCase("causal", CAUSAL),
    DeviceCase("several groups of spans", CAUSAL, 60, 60, natural(4), natural(4), span=2),
    DeviceCase("window", CAUSAL & (Q - KV < S0), 50, 83, natural(8), natural(5)),
    DeviceCase("everything", sympy.true, 64, 40),
    DeviceCase("nothing", KV < 0),
    DeviceCase("negative offset", KV <= Q + S0, 30, 50, size=-12),
    DeviceCase("size beyond int32", KV <= Q + S0, size=-(1 << 40)),
    DeviceCase("divided by a size", sympy.Eq(FloorDiv(Q, S0), FloorDiv(KV, S0))),
    DeviceCase("remainder by a size", sympy.Eq(FloorMod(Q - KV, S0), 0) & (KV * S0 < 7 * Q)),
    DeviceCase("lengths in it", KV < FloorDiv(N, 2)),
    DeviceCase("chunks", sympy.Eq(FloorDiv(Q, 12), FloorDiv(KV, 12))),
    DeviceCase("negative remainders", FloorMod(KV - Q, 7) + FloorDiv(KV - Q, 5) < 3),
    DeviceCase("scaled", sympy.Eq(4 * Q - 4 * KV, 24) | (sympy.Abs(Q - 2 * KV) < 5)),
    DeviceCase("global tokens", near(Q, KV, 9) | (Q < 16) | (KV < 16), 64, 64),
    DeviceCase("documents", DOCUMENTS),
    DeviceCase("whole blocks", CAUSAL & DOCUMENTS, 64, 64, natural(16), natural(8)),
    DeviceCase("padding", CAUSAL & sympy.Ne(PADDING(B, KV), 0)),
    DeviceCase("per-head window", CAUSAL & (Q - KV < WINDOWS(H))),
    DeviceCase("window in a tensor", CAUSAL & (Q - KV < SCALAR())),
    DeviceCase("heads by number", Q - KV < sympy.Piecewise((9, sympy.Eq(H, 0)), (30, True))),
    DeviceCase("coarse table", sympy.Ne(PADDING(B, FloorDiv(KV, 2) * 2 + S0), 0)),
    DeviceCase("whole axis", DOCS(B, sympy.Abs(Q - KV)) < 3),
    DeviceCase("pairs", sympy.Ne(PAIRS(FloorDiv(Q, 16), FloorDiv(KV, 16)), 0), 64, 80),
    DeviceCase("arithmetic", DOCS(B, KV) * 3 - Q < WINDOWS(H), span=8),
    DeviceCase("all at once", (CAUSAL & DOCUMENTS & (Q - KV < WINDOWS(H))) | (KV < 9)),
    DeviceCase("residues", on_grid(0, 1, 8), 60, 70, residues(8, 4), residues(8, 4), span=8),
    DeviceCase("causal residues", CAUSAL & on_grid(0, 1, 8), 33, 30, *(residues(8, 4),) * 2),
    DeviceCase(
        *("columns", CAUSAL & (FloorMod(KV, 16) >= 12), 60, 100, natural(8)),
        Order((2, 4), (16,), (0, 1), ((12, 16),)),
    ),
    DeviceCase("tiles", on_grid(2, 8) & on_grid(2, 1, 8), 100, 64, TILES, TILES),
    DeviceCase("boxes", on_grid(1, 32) & on_grid(1, 8, 4) & on_grid(3, 1, 8), 70, 64, BOXES, BOXES),
    DeviceCase(
        "documents of residues", DOCUMENTS & on_grid(0, 1, 4), 30, 30, *(residues(4, 4),) * 2
    ),
]


def entries(lists: BlockLists) -> list[Tensor]:
    """What every class visits, in order."""
    return [torch.stack(lists.entries(c)).cpu() for c in range(lists.counts.shape[0])]


def check(case: DeviceCase, device: torch.device) -> None:
    """The lists of the device are those of the CPU, and the host knows how long they are."""
    shape = ProblemShape(case.batch, case.heads, case.n_q, case.n_kv)
    given = Problem.of(case.mask, shape, (case.q, case.kv), [case.size])
    expected = build_layout(given, case.tables(torch.device("cpu")))
    problem = DeviceProblem.of(given, case.tables(device), device, case.span)
    for lists, wanted in ((problem.rows(), expected.rows), (problem.cols(), expected.cols)):
        assert all(tensor.dtype == torch.int32 for tensor in lists.tensors())
        assert torch.equal(lists.counts.cpu(), wanted.counts)
        for mine, its in zip(entries(lists), entries(wanted), strict=True):
            assert torch.equal(mine, its)
        visited, load = wanted.counts.sum(-1), lists.load
        assert load is not None
        assert load.n == len(load.lines)
        assert torch.equal(load.lines, visited.amax(0))
        assert load.most == visited.max()
        assert load.total <= load.lines.sum()
        assert bool((lists.start.diff().cpu() >= load.lines).all())
        used = lists.counts.sum((1, 2))
        assert bool((lists.index.count_nonzero(1) <= used).all()), "unused room is not 0"


def check_packed(case: DeviceCase, device: torch.device) -> None:
    """The lists that are made in one vector are those of the CPU, and all of the vector."""
    shape = ProblemShape(case.batch, case.heads, case.n_q, case.n_kv)
    given = Problem.of(case.mask, shape, (case.q, case.kv), [case.size])
    assert has_room(given)
    expected = build_layout(given, case.tables(torch.device("cpu")))
    made = DeviceProblem.of(given, case.tables(device), device, case.span).packed()
    again = given.unpacked(made.pack())
    for lists, wanted in ((again.rows, expected.rows), (again.cols, expected.cols)):
        assert torch.equal(lists.counts.cpu(), wanted.counts)
        for mine, its in zip(entries(lists), entries(wanted), strict=True):
            assert torch.equal(mine, its)
        used = lists.counts.sum((1, 2))
        assert bool((lists.index.count_nonzero(1) <= used).all()), "unused room is not 0"
    for mine, its in zip((again.rows, again.cols), (made.rows, made.cols), strict=True):
        assert [t.data_ptr() for t in mine.tensors()] == [t.data_ptr() for t in its.tensors()]

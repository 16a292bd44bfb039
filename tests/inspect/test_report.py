"""explain: what it finds, that its numbers are those of the call, and that it leaves no trace."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_compile import Report, SiteReport, explain_with
from sparse_compile.errors import BadOption, SparseCompileError, UnknownOption
from sparse_compile.expr import (
    KV,
    N_KV,
    N_Q,
    B,
    Bit,
    FloorDiv,
    FloorMod,
    MaskExpr,
    Q,
    evaluate,
    table,
)
from sparse_compile.inspect.explain import explain
from sparse_compile.inspect.readable import readable

N, WINDOW = 80, 12


class Attend(nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.project = nn.Linear(16, 48)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return x + out.transpose(1, 2).flatten(2)


class TwoKinds(nn.Module):
    """One sliding window, which is rewritten, and one causal SDPA, which is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.local = Attend()
        self.rest = Attend(causal=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.local(x, window_mask(x.shape[1])))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.layers = nn.ModuleList(Attend() for _ in range(3))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.dropout(layer(x, keep[:, None, None, :]))
        return x


def window_mask(n: int) -> Tensor:
    i = torch.arange(n)
    return (i[None] <= i[:, None]) & (i[:, None] - i[None] < WINDOW)


def example(batch: int = 2, n: int = N) -> Tensor:
    return torch.randn(batch, n, 16, generator=torch.Generator().manual_seed(0))


def blocks_visited(dense: Tensor, size: int) -> float:
    """Share of blocks that hold an allowed pair, from the dense mask."""
    room = -(-dense.shape[-1] // size) * size - dense.shape[-1]
    padded = F.pad(dense.float(), (0, room, 0, room))
    return float(F.max_pool2d(padded[None], size).mean())


def test_rewritten_and_rejected() -> None:
    report = explain(TwoKinds(), example())
    assert report.graphs == 1
    local, rest = report.sites
    assert local.rewritten
    assert local.executor == "cpu"
    assert local.mask == "kv <= q and q - kv < 12"
    dense = window_mask(N)
    assert local.density == pytest.approx(dense.float().mean().item())
    assert local.block_density == pytest.approx(blocks_visited(dense, 32))
    assert local.where.startswith("local, ")
    assert "test_report.py" in local.where
    assert not rest.rewritten
    assert rest.executor == "unchanged"
    assert "causal" in rest.reason
    assert rest.hint
    assert rest.where.startswith("rest, ")
    assert (rest.mask, rest.density, rest.kernel) == (None, None, None)


def test_density_is_that_of_the_values_in_the_call() -> None:
    keep = torch.ones(2, N, dtype=torch.bool)
    keep[0, 50:] = False
    keep[1, 7:] = False
    for share in (keep, ~keep):
        report = explain(Padded().eval(), example(), share)
        assert [site.density for site in report.sites] == [pytest.approx(share.float().mean())] * 3


def test_mask_changed_in_place_after_use_counts_as_it_was_used() -> None:
    def model(x: Tensor, keep: Tensor) -> Tensor:
        x = Attend.forward(attend, x, keep[:, None, None, :])
        keep.fill_(True)
        return x

    attend = Attend()
    report = explain(model, example(), torch.arange(N).expand(2, N) < 20)
    assert report.sites[0].density == pytest.approx(20 / N)


def test_printing() -> None:
    keep = torch.ones(2, N, dtype=torch.bool)
    text = str(explain(Padded().eval(), example(), keep))
    first, *_ = text.splitlines()
    assert first == "sparse_compile: 3 of 3 attentions rewritten, in 1 graph"
    # Layers that differ only in where they stand are told once.
    assert text.count("rewritten   yes: ") == 1
    for number in range(3):
        assert f"[{number}] layers.{number}, test_report.py:" in text.replace(
            str(Path(__file__).parent) + "/", ""
        )
    assert "100 % of the pairs may attend" in text
    assert "nothing is skipped" in text
    assert max(map(len, text.splitlines())) <= 120


def test_printing_says_why_and_what_to_do() -> None:
    text = str(explain(TwoKinds(), example()))
    assert "1 of 2 attentions rewritten" in text
    assert "rewritten   no: " in text
    assert "hint        options=" in text
    assert "mask        " in text
    assert "blocks      " in text


def test_printing_many_layers_is_short() -> None:
    sites = tuple(SiteReport(f"layers.{i}", True, "narrow") for i in range(32))
    text = str(Report(sites, 1))
    assert "and 28 more like these: 4-31" in text
    assert len(text.splitlines()) < 12


def test_printing_nothing_found() -> None:
    assert str(explain(nn.Linear(4, 4), torch.ones(1, 4))) == (
        "sparse_compile: no attention found, in 1 graph"
    )


def test_json_round_trip_and_key_order() -> None:
    report = explain(TwoKinds(), example())
    assert Report.from_json(report.to_json()) == report
    read = json.loads(report.to_json())
    assert list(read) == ["graphs", "sites"]
    assert list(read["sites"][0]) == list(SiteReport.__dataclass_fields__)


def test_graph_breaks_are_seen_and_counted() -> None:
    model = TwoKinds()

    def broken(x: Tensor) -> Tensor:
        x = model(x)
        torch._dynamo.graph_break()
        return model(x)

    report = explain(broken, example())
    assert report.graphs == 2
    assert [site.rewritten for site in report.sites] == [True, False, True, False]
    assert "in 2 graphs (1 graph break)" in str(report)


def test_options_are_the_backend_s() -> None:
    report = explain_with({"dense": "rewrite"})(TwoKinds(), example())
    assert report.rewritten == 2
    dense = torch.ones(N, N).tril().bool()
    assert report.sites[1].density == pytest.approx(dense.float().mean().item())
    with pytest.raises(UnknownOption, match="Did you mean 'dense'"):
        explain_with({"dens": "rewrite"})
    with pytest.raises(BadOption, match="'sdpa' or 'rewrite'"):
        explain_with({"dense": "no"})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_leaves_no_trace(training: bool, grad: bool) -> None:
    model = Padded().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    keep = torch.ones(2, N, dtype=torch.bool)
    state = torch.random.get_rng_state()
    with torch.set_grad_enabled(grad):
        explain(model, example(), keep)
        assert torch.is_grad_enabled() == grad
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training == training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_does_not_disturb_what_is_compiled() -> None:
    compiles: list[Any] = []

    def counting(gm: Any, inputs: Any) -> Any:
        compiles.append(gm)
        return gm.forward

    model = TwoKinds()
    compiled = torch.compile(model, backend=counting)
    expected = compiled(example())
    reports = [explain(model, example()) for _ in range(12)]
    assert all(report == reports[0] for report in reports)
    assert torch.equal(compiled(example()), expected)
    assert len(compiles) == 1


def test_looks_through_a_compiled_model() -> None:
    model = TwoKinds()
    expected = explain(model, example())
    assert explain(torch.compile(model, backend="eager"), example()) == expected
    model.compile(backend="eager")
    assert explain(model, example()) == expected


def test_says_so_when_nothing_is_skipped() -> None:
    model = Attend()

    def spread(x: Tensor) -> Tensor:
        i = torch.arange(x.shape[1])
        q, kv = i[:, None], i[None]
        return model(x, (q * q * 7 + kv * kv * 13 + q * kv) % 1009 < 300)

    (site,) = explain(spread, example()).sites
    assert site.density == pytest.approx(0.3, abs=0.03)
    assert site.block_density == 1.0
    assert "nothing is skipped" in site.hint


def test_says_in_which_views_and_why() -> None:
    model = Attend()

    def strided(x: Tensor) -> Tensor:
        i = torch.arange(x.shape[1])
        return model(x, (i[:, None] - i[None]) % 8 == 0)

    (site,) = explain(strided, example()).sites
    assert site.density == pytest.approx(1 / 8)
    assert site.views
    assert "instead of" in site.cost
    assert site.block_density is not None
    assert site.block_density < 0.5
    assert f"views       {site.views[0]}" in str(explain(strided, example()))


def test_where() -> None:
    local, rest = Attend(), [Attend()]

    def model(x: Tensor) -> Tensor:
        return rest[0](local(x))

    first, second = explain(model, example()).sites
    assert first.where.startswith("local, test_report.py:")
    assert second.where.startswith("rest[0], test_report.py:")
    q = torch.randn(1, 1, 4, 4)
    (bare,) = explain(lambda x: F.scaled_dot_product_attention(x, x, x), q).sites
    assert bare.where.startswith("test_report.py:")


def test_other_lengths_later() -> None:
    model = TwoKinds()
    for n in (N, 40, 96, 7):
        site = explain(model, example(n=n)).sites[0]
        assert site.density == pytest.approx(window_mask(n).float().mean().item())


def test_keyword_arguments_of_the_model_are_free() -> None:
    def model(options: Tensor, model: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(options, model, model)

    q = torch.randn(1, 1, 4, 4)
    assert len(explain(model, options=q, model=q).sites) == 1


def test_public_names() -> None:
    import sparse_compile.backend
    import sparse_compile.inspect.explain  # these must not hide the functions of the same name

    for name in sparse_compile.__all__:
        assert hasattr(sparse_compile, name)
    assert callable(sparse_compile.backend)
    assert callable(sparse_compile.explain)
    assert set(sparse_compile.__all__) <= set(dir(sparse_compile))
    with pytest.raises(AttributeError, match="no attribute 'explian'"):
        sparse_compile.explian  # noqa: B018
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'\nversion = "{sparse_compile.__version__}"\n' in pyproject


def test_import_is_light() -> None:
    program = (
        "import sys, sparse_compile; print(sorted({'torch', 'sympy', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


_T = table(0)
PREDICATES = [
    (KV <= Q) & (Q - KV < 12),
    (KV < 4) | ((KV <= Q) & sympy.Ne(_T(B, KV), 0)),
    sympy.Not((KV <= Q) | (KV < 3)) | sympy.Eq(_T(B, Q), _T(B, KV)),
    sympy.Eq(FloorMod(Q - 3 * KV - 2, 7), 0),
    sympy.Eq(FloorDiv(Q - 5, 4), FloorDiv(KV - _T(B, KV), 4)),
    sympy.Le(sympy.Abs(2 * (Q - KV) * (Q + 1) - N_KV), 2 * sympy.Min(Q, KV + 3)),
    sympy.Le(sympy.Piecewise((Q - KV, KV < 5), (-(Q + KV) * 2, True)), -8),
    sympy.Ne(Bit(_T(B, Q) - 2, FloorMod(KV + 1, 32)), 0) | (Bit(_T(B, KV), Q) + KV < 4),
    sympy.Ge(FloorDiv(Q, FloorDiv(KV, 3) + 1) * FloorMod(Q, 4), sympy.Max(2, KV - N_Q)),
]


@pytest.mark.parametrize("predicate", PREDICATES, ids=map(str, range(len(PREDICATES))))
def test_a_printed_mask_means_what_the_mask_means(predicate: sympy.Basic) -> None:
    n = 9
    values = torch.arange(2 * n).view(2, n) % 4
    names: dict[str, Any] = {
        "n_q": n,
        "n_kv": n,
        "t0": values,
        "where": lambda c, a, b: a if c else b,
    }
    line = torch.arange(n)
    batch = torch.arange(2)
    where = {"b": batch[:, None, None], "h": line[:1], "q": line[:, None], "kv": line}
    dense = evaluate(MaskExpr(predicate, ("int64",)), where, n, n, [values]).expand(2, n, n)
    printed = readable(predicate)
    for b, q, kv in itertools.product(range(2), range(n), range(n)):
        point = {**names, "b": b, "q": q, "kv": kv}
        assert bool(eval(printed, point)) == bool(dense[b, q, kv]), (printed, b, q, kv)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(31, 32).bool()),
            r"mask of shape \[31, 32\].*make it 32 or 1",
        ),
        (
            lambda q: F.scaled_dot_product_attention(q, q[:, :3], q[:, :3], enable_gqa=True),
            "4 query heads cannot share 3 key",
        ),
        (lambda q: F.scaled_dot_product_attention(*[q.int()] * 3), "Cast q, k and v"),
    ],
)
def test_calls_that_cannot_work_get_one_clear_error(call: object, message: str) -> None:
    with pytest.raises(SparseCompileError, match=message) as caught:
        explain(call, torch.randn(1, 4, 32, 16))
    assert "test_report.py" in str(caught.value)

"""Random mask programs: whatever is lifted must equal what the program computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from sparse_compile.expr import KV, MaskExpr, Q, evaluate
from sparse_compile.passes.lift.lift import Lifter
from sparse_compile.passes.lift.masks import at_coordinates
from sparse_compile.passes.lift.value import Lifted, reads_data
from sparse_compile.sites.site import LiftedMask
from tests.passes.lifting import attend, capture, evaluated, lift, rebound

N = 12
#: A program over the row and column numbers, [N, 1] and [1, N], that makes an [N, N] mask.
Program = Callable[[Tensor, Tensor], Tensor]

small = st.integers(-6, 6)
positive = st.integers(1, 6)


def unary(inner: st.SearchStrategy[Program]) -> st.SearchStrategy[Program]:
    def apply(f: Program, kind: int, c: int, d: int) -> Program:
        return [
            lambda q, k: f(q, k) + c,
            lambda q, k: f(q, k) * c,
            lambda q, k: f(q, k) // d,
            lambda q, k: f(q, k) % d,
            lambda q, k: f(q, k).abs(),
            lambda q, k: f(q, k).clamp(min=c, max=c + d),
            lambda q, k: c - f(q, k),
            lambda q, k: f(q, k).flip(0),
            lambda q, k: f(q, k).roll(c, 1),
            lambda q, k: f(q, k).to(torch.int32),
            lambda q, k: torch.div(f(q, k), d, rounding_mode="floor"),
            lambda q, k: f(q, k).float().mul(d).long(),
            lambda q, k: torch.where(f(q, k) < c, f(q, k), d),
            lambda q, k: (f(q, k) < c).long() * d,
        ][kind]

    return st.builds(apply, inner, st.integers(0, 13), small, positive)


def binary(inner: st.SearchStrategy[Program]) -> st.SearchStrategy[Program]:
    operators = st.sampled_from([torch.add, torch.sub, torch.minimum, torch.maximum])
    return st.builds(lambda o, f, g: lambda q, k: o(f(q, k), g(q, k)), operators, inner, inner)


numbers: st.SearchStrategy[Program] = st.recursive(
    st.sampled_from([lambda q, k: q, lambda q, k: k]),
    lambda inner: st.one_of(unary(inner), binary(inner)),
    max_leaves=3,
)

compared: st.SearchStrategy[Program] = st.builds(
    lambda o, f, g: lambda q, k: o(f(q, k), g(q, k)).expand(N, N),
    st.sampled_from([torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne]),
    numbers,
    numbers,
)


def written(f: Program, kind: int, a: int, b: int, value: bool) -> Program:
    """In-place changes of a mask."""

    def run(q: Tensor, k: Tensor) -> Tensor:
        m = f(q, k).clone()
        if kind == 0:
            m[a : a + b] = value
        elif kind == 1:
            m[:, a::b] = value
        elif kind == 2:
            m[abs(a), abs(b)] = value
        elif kind == 3:
            m[torch.arange(N) % b == 0] = value
        elif kind == 4:
            m.diagonal().fill_(value)
        elif kind == 5:
            m[a : a + b, a : a + b].logical_not_()
        elif kind == 6:
            m.t()[abs(a)].logical_not_()
        elif kind == 7:
            m[:, torch.arange(abs(a), abs(a) + b)] = value
        elif kind == 8:
            m.masked_fill_(k > a, value)
        else:
            m.view(3, 4, N)[:, 1] = value
        return m

    return run


def moved(f: Program, kind: int, a: int, b: int) -> Program:
    """Masks cut, moved and put together again."""
    return [
        lambda q, k: ~f(q, k),
        lambda q, k: f(q, k).t(),
        lambda q, k: f(q, k).tril(a),
        lambda q, k: f(q, k).triu(a),
        lambda q, k: f(q, k).flip(1),
        lambda q, k: f(q, k).roll(a, 0),
        lambda q, k: torch.cat([f(q, k)[b:], f(q, k)[:b]]),
        lambda q, k: f(q, k).view(3, 4, N).transpose(0, 1).reshape(N, N),
        lambda q, k: f(q, k)[::2].repeat_interleave(2, 0),
        lambda q, k: f(q, k)[:, :4].repeat(1, 3),
        lambda q, k: torch.kron(f(q, k)[:4, :3].float(), torch.ones(3, 4)) > 0,
        lambda q, k: f(q, k)[(torch.arange(N) * b) % N],
        lambda q, k: torch.stack(f(q, k).chunk(2), 1).reshape(N, N),
        lambda q, k: torch.where(f(q, k), 0.0, float("-inf")) == 0,
        lambda q, k: (1.0 - f(q, k).half()) * torch.finfo(torch.float16).min > -1,
        lambda q, k: f(q, k).int().mul(b) > 0,
        lambda q, k: f(q, k).gather(1, (k * b % N).expand(N, N)),
        lambda q, k: f(q, k).index_select(1, torch.arange(N).flip(0)),
    ][kind]


masks: st.SearchStrategy[Program] = st.recursive(
    compared,
    lambda inner: st.one_of(
        st.builds(
            lambda o, f, g: lambda q, k: o(f(q, k), g(q, k)),
            st.sampled_from([torch.logical_and, torch.bitwise_or, torch.bitwise_xor]),
            inner,
            inner,
        ),
        st.builds(moved, inner, st.integers(0, 17), small, positive),
        st.builds(written, inner, st.integers(0, 9), small, positive, st.booleans()),
        st.builds(
            lambda c, f, g: lambda q, k: torch.where(c(q, k), f(q, k), g(q, k)), inner, inner, inner
        ),
    ),
    max_leaves=4,
)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(masks)
def test_lifted_programs_equal_themselves(program: Program) -> None:
    found = lifted_program(program)
    if not reads_data(found.condition):
        torch.testing.assert_close(dense(found), run(program))


def run(program: Program) -> Tensor:
    return program(torch.arange(N)[:, None], torch.arange(N)[None])


def lifted_program(program: Program) -> Lifted:
    traced = make_fx(torch.func.functionalize(lambda: run(program)), tracing_mode="fake")()
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    return Lifter(traced, ()).tensor(output.args[0])


def dense(found: Lifted) -> Tensor:
    predicate = at_coordinates(found.condition, found, (Q, KV))
    coordinates = {"q": torch.arange(N)[:, None], "kv": torch.arange(N)}
    return evaluate(MaskExpr(predicate), coordinates, N, N).expand(N, N)


def test_most_programs_are_understood() -> None:
    """The property above is not vacuous: what it is made of is lifted, not given up."""
    given_up = []
    for kind in range(18):
        program = moved(lambda q, k: (q - k < 5) & (k <= q), kind, 1, 2)
        given_up += [kind] if reads_data(lifted_program(program).condition) else []
    assert given_up == []


tabled = st.lists(
    st.sampled_from(
        [
            lambda q, k, pad, doc: pad[:, None, :],
            lambda q, k, pad, doc: pad[:, :, None] | (q == k),
            lambda q, k, pad, doc: doc[:, :, None] == doc[:, None, :],
            lambda q, k, pad, doc: doc[:, None, :] <= doc[:, :, None] - 1,
            lambda q, k, pad, doc: k < doc.amax(-1)[:, None, None] + 3,
            lambda q, k, pad, doc: (k - doc[:, :1, None]) // 4 == (q - doc[:, :1, None]) // 4,
            lambda q, k, pad, doc: doc.roll(1, 1)[:, None, :] * 2 > q,
            lambda q, k, pad, doc: (doc % 2 == 0)[:, None] & (doc < 5)[:, None] & (k > 1),
            lambda q, k, pad, doc: pad.flip(1)[:, None, :] ^ (k <= q),
            lambda q, k, pad, doc: torch.cat([pad[:, :3], doc[:, 3:] > 1], 1)[:, None],
            lambda q, k, pad, doc: (doc.cumsum(-1)[:, None] > 2 * q) & (k <= q),
            lambda q, k, pad, doc: (doc.float() / 3 > 1.0)[:, None, :],
            lambda q, k, pad, doc: pad[:, None].to(torch.uint8) * 3 > 1,
        ]
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("dynamic", [False, True])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(parts=tabled, seed=st.integers(0, 9))
def test_run_time_data(dynamic: bool, parts: list[Callable[..., Tensor]], seed: int) -> None:
    def mask(pad: Tensor, doc: Tensor) -> Tensor:
        i = torch.arange(pad.shape[1])
        found = parts[0](i[:, None], i[None], pad, doc)
        for part in parts[1:]:
            found = found & part(i[:, None], i[None], pad, doc)
        return found[:, None]

    def run(x: Tensor, pad: Tensor, doc: Tensor) -> Tensor:
        return attend(x, mask(pad, doc))

    captured = capture(run, *data(3, N, seed), dynamic=dynamic)
    found = lift(captured)
    assert isinstance(found, LiftedMask), found
    x, pad, doc = data(5, 17, seed) if dynamic else data(3, N, seed + 1)
    shape = (x.shape[0], 2, x.shape[2], x.shape[2])
    values = rebound(captured, {"x": x, "pad": pad, "doc": doc})
    torch.testing.assert_close(evaluated(found, values, shape), mask(pad, doc).expand(shape))


def data(batch: int, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pad = torch.rand(batch, n, generator=generator) < 0.6
    doc = torch.randint(0, 9, (batch, n), generator=generator)
    return torch.randn(batch, 2, n, 4), pad, doc

"""Slicing by data flow and by mutation, with the position of the attention taken into account."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparse_compile.expr import KV, Q
from sparse_compile.options import Options
from sparse_compile.passes.lift import LiftCache, lift_mask
from sparse_compile.sites.site import LiftedMask
from tests.passes.lifting import attend, capture, eager, lift, lifted, refused, sites

N = 12


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 2, N, 4)


def causal() -> Tensor:
    i = torch.arange(N)
    return i[None] <= i[:, None]


def test_writes_before_the_attention_count(x: Tensor) -> None:
    def run(x: Tensor) -> Tensor:
        mask = torch.zeros(N, N, dtype=torch.bool)
        mask[:, :4] = True
        return attend(x, mask)

    assert str(lifted(run, x).mask) == "kv < 4"


def test_writes_after_the_attention_do_not(x: Tensor) -> None:
    def run(x: Tensor) -> Tensor:
        mask = causal()
        out = attend(x, mask)
        mask[:, :4] = True
        mask.zero_()
        return out + mask.sum()

    assert lifted(run, x).mask.predicate == (KV <= Q)


def test_two_attentions_see_the_mask_at_their_own_time(x: Tensor) -> None:
    def run(x: Tensor) -> Tensor:
        mask = causal()
        first = attend(x, mask)
        mask[:, :4] = True
        return attend(first, mask)

    captured = capture(run, x)
    cache = LiftCache()
    found = [lift_mask(s, captured.inputs, Options(), cache) for s in sites(captured.gm)]
    predicates = [mask.mask.predicate for mask in found if isinstance(mask, LiftedMask)]
    assert predicates == [KV <= Q, (KV < 4) | (KV <= Q)]


@pytest.mark.parametrize(
    "write",
    [
        lambda m: m[0].fill_(True),
        lambda m: m.view(-1)[:N].fill_(True),
        lambda m: m[:1].copy_(torch.ones(1, N, dtype=torch.bool)),
        lambda m: m[0].logical_or_(torch.ones(N).bool()),
        lambda m: m.index_fill_(0, torch.tensor([0]), True),
        lambda m: m.__setitem__(0, True),
        lambda m: torch.logical_or(m, torch.arange(N)[:, None] == 0, out=m),
        lambda m: torch.fill_(m[0], True),
        lambda m: m.masked_fill_((torch.arange(N) == 0)[:, None], True),
        lambda m: m.mT[:, 0].bitwise_or_(torch.tensor(True)),
        lambda m: m.unbind(0)[0].fill_(True),
        lambda m: m.split(1)[0].fill_(True),
        lambda m: m.detach()[0].fill_(True),
        lambda m: torch.ops.aten.fill_.Scalar(m[0], True),
    ],
)
def test_every_spelling_of_a_write(x: Tensor, write: object) -> None:
    def run(x: Tensor) -> Tensor:
        mask = causal()
        write(mask)  # type: ignore[operator]
        return attend(x, mask)

    found = lift(capture(run, x))
    assert isinstance(found, LiftedMask), found
    assert found.mask.predicate == (KV <= Q) | sympy.Eq(Q, 0)


def test_in_place_chains_that_rename_the_mask(x: Tensor) -> None:
    def run(x: Tensor) -> Tensor:
        mask = torch.zeros(N, N, dtype=torch.bool)
        mask |= causal()
        alias = mask
        alias &= torch.arange(N) < 9
        return attend(x, mask)

    assert lifted(run, x).mask.predicate == (KV < 9) & (KV <= Q)


def test_an_input_that_is_written_before_is_refused(x: Tensor) -> None:
    def run(x: Tensor, pad: Tensor) -> Tensor:
        pad[:, 0] = True
        return attend(x, causal() & pad[:, None, None])

    assert "writes to" in refused(run, x, torch.ones(2, N, dtype=torch.bool)).reason


def test_an_input_that_is_written_after_the_mask_read_it(x: Tensor) -> None:
    def run(x: Tensor, seen: Tensor) -> Tensor:
        mask = torch.arange(N) <= seen
        seen.add_(1)
        return attend(x, mask.expand(N, N))

    found = lifted(run, x, torch.tensor(5))
    assert str(found.mask) == "kv <= t0()"
    # The table is memory of its own, so the write cannot reach it.
    seen = torch.tensor(7)
    assert found.program is not None
    (table,) = found.program(seen)
    seen.add_(1)
    assert int(table) == 7


def test_operators_that_only_end_like_writes(x: Tensor) -> None:
    def run(x: Tensor, pad: Tensor) -> Tensor:
        both = pad[:, None] & pad[:, None].flip(-1)
        return attend(x, (both | pad[:, None])[:, None])

    assert str(lifted(run, x, torch.ones(2, N, dtype=torch.bool)).mask) == "Ne(t0(b, kv), 0)"


def test_random_and_expensive_producers_are_not_run_again(x: Tensor) -> None:
    def run(x: Tensor) -> Tensor:
        drop = torch.rand(2, 1, 1, N) < 0.5
        return attend(x, causal() & drop)

    found = lifted(run, x)
    assert [leaf.target.__name__ for leaf in found.leaves] == ["rand"]  # type: ignore[union-attr]

    def routed(x: Tensor, weight: Tensor) -> Tensor:
        score = F.linear(x[:, 0], weight)
        return attend(x, causal() & (score > 0)[:, None, None, :, 0])

    found = lifted(routed, x, torch.randn(1, 4))
    assert found.mask.tables == ("bool",)
    assert str(found.mask) == "(kv <= q) & Ne(t0(b, kv), 0)"


def test_vmap_regions_are_replayed_whole(x: Tensor) -> None:
    def run(x: Tensor) -> Tensor:
        other = torch.vmap(lambda a: a * 2)(x)
        i = torch.arange(N)
        mask = torch.vmap(lambda q: torch.vmap(lambda k: k <= q)(i))(i)
        return attend(other, mask)

    assert lifted(run, x).mask.predicate == (KV <= Q)


def test_layers_share_one_lift(x: Tensor) -> None:
    def run(x: Tensor) -> Tensor:
        mask = causal()
        for _ in range(3):
            x = attend(x, mask)
        return x

    captured = capture(run, x)
    cache = LiftCache()
    found = [lift_mask(s, captured.inputs, Options(), cache) for s in sites(captured.gm)]
    assert len({id(mask) for mask in found}) == 1
    assert len(cache.traced) == 1


@pytest.mark.parametrize("inside", [False, True])
def test_masks_reach_into_activation_checkpoints(x: Tensor, inside: bool) -> None:
    def block(x: Tensor, mask: Tensor) -> Tensor:
        return attend(x, ~mask if inside else mask)

    def run(x: Tensor, pad: Tensor) -> Tensor:
        keep = causal() & pad[:, None, None]
        return checkpoint(block, x, ~keep if inside else keep, use_reentrant=False)

    captured = capture(run, x.requires_grad_(), torch.ones(2, N, dtype=torch.bool))
    (site,) = sites(captured.gm)
    assert site.scope.parent is not None
    found = lift(captured, site)
    assert isinstance(found, LiftedMask), found
    assert str(found.mask) == "(kv <= q) & Ne(t0(b, kv), 0)"
    assert found.scope is not None
    assert found.scope.gm is captured.gm


def test_a_mask_made_inside_a_checkpoint(x: Tensor) -> None:
    def block(x: Tensor, pad: Tensor) -> Tensor:
        return eager(x, lambda s: s.masked_fill(~(causal() & pad[:, None, None]), float("-inf")))

    def run(x: Tensor, pad: Tensor) -> Tensor:
        return checkpoint(block, x, pad, use_reentrant=False)

    captured = capture(run, x.requires_grad_(), torch.ones(2, N, dtype=torch.bool))
    found = lift(captured)
    assert isinstance(found, LiftedMask), found
    assert str(found.mask) == "(kv <= q) & Ne(t0(b, kv), 0)"

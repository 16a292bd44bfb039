"""Masks that scatter indices, in the ways that programs write them, and those that only look so."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_compile import mask as annotate
from sparse_compile import patterns as P
from sparse_compile import reference
from sparse_compile.sites.plan import Plan
from sparse_compile.spec import EmptyRows
from tests.passes.rewritten import Rewritten, assert_same, trained

BATCH, HEADS, LENGTH, DIM, BLOCK, KEPT = 2, 4, 40, 16, 8, 2
UNITS = LENGTH // BLOCK

Masked = Callable[[Tensor, Tensor], Tensor]


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def by_key(gate: Tensor, index: Tensor) -> Tensor:
    """Each index is a key."""
    return torch.zeros_like(gate, dtype=torch.bool).scatter(-1, index, True)


def excluded(gate: Tensor, index: Tensor) -> Tensor:
    """Everything is masked but what the index names."""
    return ~torch.ones_like(gate, dtype=torch.bool).scatter(-1, index, False)


def in_place(gate: Tensor, index: Tensor) -> Tensor:
    mask = torch.zeros(gate.shape, dtype=torch.bool)
    mask.scatter_(-1, index, True)
    return mask


def from_source(gate: Tensor, index: Tensor) -> Tensor:
    return (
        torch.zeros_like(gate).scatter(-1, index, torch.ones_like(index, dtype=gate.dtype)).bool()
    )


def added(gate: Tensor, index: Tensor) -> Tensor:
    """A score of -inf where the index does not say 0."""
    mask = torch.full(gate.shape, -math.inf).scatter_(-1, index, 0.0)
    return mask.masked_fill(~causal(), -math.inf)


def one_hot(gate: Tensor, index: Tensor) -> Tensor:
    return F.one_hot(index, gate.shape[-1]).sum(-2) > 0


def compared(gate: Tensor, index: Tensor) -> Tensor:
    return (index[..., None] == torch.arange(gate.shape[-1])).any(-2)


def shifted(gate: Tensor, index: Tensor) -> Tensor:
    """The index is not the top-k's own: what it names is what counts."""
    return by_key(gate, (index * 2 + 1) % gate.shape[-1])


def through_a_spare_column(gate: Tensor, index: Tensor) -> Tensor:
    """Some indices point to a column that is cut off."""
    index = index.masked_fill(index % 3 == 0, gate.shape[-1])
    wide = torch.zeros(*gate.shape[:-1], gate.shape[-1] + 1, dtype=torch.bool)
    return wide.scatter(-1, index, True)[..., : gate.shape[-1]]


WAYS = [by_key, excluded, in_place, from_source, added, one_hot, compared]
WAYS += [shifted, through_a_spare_column]


def operands(length: int = LENGTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shape = (BATCH, HEADS, length, DIM)
    return [torch.randn(shape, generator=generator, requires_grad=True) for _ in range(3)]


def gate_of(heads: int, columns: int) -> Tensor:
    shape = (BATCH, heads, LENGTH, columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def gradients(call: Callable[..., Tensor], *args: Tensor) -> list[Tensor]:
    for arg in args:
        arg.grad = None
    output = call(*args)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    (output * weights).sum().backward()
    return [output.detach(), *(arg.grad for arg in args if arg.grad is not None)]


def agree(run: Callable[..., Tensor], *args: Tensor) -> Plan:
    """Compiled as eager, gradients included; the decision, which must be a plan."""
    program = Rewritten()
    fast = program.compiled(run)
    assert_same(gradients(fast, *args), gradients(run, *args))
    (found,) = program.decisions
    assert isinstance(found, Plan), found
    return found


@pytest.mark.parametrize("block", [1, BLOCK])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_write_it(way: Masked, block: int) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        mask = way(gate, gate.topk(KEPT, -1).indices)
        if block > 1:
            mask = mask.repeat_interleave(block, -1)
        mask = mask & causal() if mask.dtype == torch.bool else mask
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    if way is added and block > 1:
        pytest.skip("its causal part is by key")
    found = agree(run, *operands(), gate_of(HEADS, LENGTH // block))
    assert found.listed is not None, found.reason
    assert (found.listed.unit_q, found.listed.unit_kv) == (1, block)
    assert str(found.listed.mask.predicate) == "kv <= q"
    own = way not in (shifted, through_a_spare_column)
    units = f"units of 1 query and {block} key{'s' if block > 1 else ''}"
    assert found.reason.startswith(f"selected: {'top-k of ' * own}{KEPT} indices, {units}")


@pytest.mark.parametrize("lists", [1, 2, HEADS])
def test_heads_share_lists(lists: int) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        mask = by_key(gate, gate.topk(5, -1).indices).repeat_interleave(HEADS // lists, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask & causal())

    assert agree(run, *operands(), gate_of(lists, LENGTH)).executor == "selected"


@pytest.mark.parametrize(
    ("fill", "policy"), [(-math.inf, EmptyRows.NAN), (torch.finfo(torch.float).min, EmptyRows.MEAN)]
)
def test_queries_without_a_key(fill: float, policy: EmptyRows) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        mask = by_key(gate, gate.topk(KEPT, -1).indices) & causal()
        weights = (q @ k.mT * 0.25).masked_fill(~mask, fill).softmax(-1)
        return weights @ v

    found = agree(run, *operands(), gate_of(HEADS, LENGTH))
    assert found.listed is not None
    assert found.listed.empty_rows is policy


def test_against_the_definition() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        mask = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).scatter(-1, index, True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask & causal())

    q, k, v = operands()
    index = torch.randint(0, LENGTH, (BATCH, 1, LENGTH, 7))
    program = Rewritten()
    out = program.compiled(run)(q, k, v, index)
    mask = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).scatter(-1, index, True)
    truth, _ = reference.attention(q, k, v, mask=mask & causal(), scale=DIM**-0.5)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)


class Moba(nn.Module):
    """Mixture of block attention in plain PyTorch, after https://arxiv.org/abs/2502.13189."""

    def __init__(self, width: int = HEADS * DIM) -> None:
        super().__init__()
        self.norm, self.out = nn.RMSNorm(width), nn.Linear(width, width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, length, 3, HEADS, DIM)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        means = k.view(batch, HEADS, length // BLOCK, BLOCK, DIM).mean(3)
        gate = torch.einsum("bhqd,bhnd->bhqn", q, means)
        own = torch.arange(length)[:, None] // BLOCK
        blocks = torch.arange(length // BLOCK)
        gate = gate.masked_fill(blocks > own, -math.inf).masked_fill(blocks == own, math.inf)
        mask = self.best(gate).repeat_interleave(BLOCK, -1)
        at = torch.arange(length)
        mask = mask & (at <= at[:, None])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(out.transpose(1, 2).reshape(batch, length, -1))

    def best(self, gate: Tensor) -> Tensor:
        """Which blocks are attended to."""
        index = gate.topk(KEPT, -1).indices
        return torch.zeros_like(gate, dtype=torch.bool).scatter(-1, index, True)


def test_moba() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Moba(), Moba())
    x = torch.randn(1, 104, HEADS * DIM)  # no other tensor has 104 * 104 numbers
    program = Rewritten()
    assert_same(trained(program.compiled(network), network, x), trained(network, network, x))
    assert program.squares(104) == []
    for found in program.decisions:
        assert isinstance(found, Plan)
        assert found.listed is not None
        assert (found.listed.unit_q, found.listed.unit_kv) == (1, BLOCK)
        assert "its top-k is left as it is" in found.reason


# What lists cannot say ---------------------------------------------------------------------------


def with_others(gate: Tensor, index: Tensor) -> Tensor:
    at = torch.arange(LENGTH)
    return by_key(gate, index) | (at[:, None] - at < 4)


def twice(gate: Tensor, index: Tensor) -> Tensor:
    return by_key(gate, index) & by_key(gate, (index + 1) % LENGTH)


def for_all_queries(gate: Tensor, index: Tensor) -> Tensor:
    return by_key(gate, index)[:, :, :1]


def backwards(gate: Tensor, index: Tensor) -> Tensor:
    return by_key(gate, index).flip(-1)


@pytest.mark.parametrize(
    ("way", "why"),
    [
        (with_others, "does not just narrow the mask"),
        (twice, "combines several selections"),
        (for_all_queries, "read at 0|one for all queries"),
        (backwards, "read at key"),
    ],
)
def test_what_lists_cannot_say(way: Masked, why: str) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        mask = way(gate, gate.topk(9, -1).indices) & causal()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    found = agree(run, *operands(), gate_of(HEADS, LENGTH))
    assert found.listed is None
    assert any(part in found.reason for part in why.split("|")), found.reason


def test_scattered_values_are_a_bias() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        best = gate.topk(9, -1)
        mask = torch.full_like(gate, -math.inf).scatter(-1, best.indices, best.values)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    program = Rewritten()
    gate = gate_of(HEADS, LENGTH)
    args = [arg.detach() for arg in operands()]
    torch.testing.assert_close(program.compiled(run)(*args, gate), run(*args, gate))
    (found,) = program.decisions
    assert not isinstance(found, Plan)
    assert "bias" in found.reason


def test_the_mask_may_be_read_elsewhere() -> None:
    """It then exists for that reader; attention does without it all the same."""

    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        mask = by_key(gate, gate.topk(5, -1).indices) & causal()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out + mask.sum(-1, keepdim=True)

    assert agree(run, *operands(), gate_of(HEADS, LENGTH)).executor == "selected"


def test_an_index_that_changes_later() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        index = gate.topk(5, -1).indices
        mask = by_key(gate, index) & causal()
        index.zero_()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out + index.sum()

    program = Rewritten()
    args = [arg.detach() for arg in operands()]
    gate = gate_of(HEADS, LENGTH)
    torch.testing.assert_close(program.compiled(run)(*args, gate), run(*args, gate))


def test_a_restriction_narrows_it() -> None:
    import sparse_compile

    @sparse_compile.mask(P.SlidingWindow(6))
    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        mask = by_key(gate, gate.topk(5, -1).indices) & causal()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    program = Rewritten()
    q, k, v = (arg.detach() for arg in operands())
    gate = gate_of(HEADS, LENGTH)
    out = program.compiled(run)(q, k, v, gate)
    mask = by_key(gate, gate.topk(5, -1).indices) & causal()
    mask = mask & torch.as_tensor(P.SlidingWindow(6).dense(LENGTH, LENGTH))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_an_annotation_that_selects_on_top_of_a_mask_that_does() -> None:
    index = torch.randint(0, 20, (1, 1, 20, 3))

    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
            chosen = torch.zeros(1, 1, 20, 20, dtype=torch.bool).scatter(-1, index, True)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=chosen)

    also = P.Selected(torch.zeros(1, 1, 20, 1, dtype=torch.int64), unit_kv=1)
    module = annotate(Attend(), also)
    q, k, v = torch.randn(3, 1, 2, 20, 16)
    with pytest.raises(Exception, match="its own mask selects keys by index"):
        torch.compile(module, backend="sparse_compile")(q, k, v, index)

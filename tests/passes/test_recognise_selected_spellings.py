"""The many ways to say that an index selects keys, and to make keys of blocks: a table of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.sites.plan import Plan
from tests.passes.rewritten import Rewritten
from tests.passes.test_recognise_selected import (
    BATCH,
    BLOCK,
    HEADS,
    KEPT,
    LENGTH,
    Masked,
    agree,
    causal,
    gate_of,
    operands,
)


def counters(shape: torch.Size) -> tuple[Tensor, ...]:
    """Batch entries, heads and queries, each along an axis of its own."""
    batch, heads, rows = (torch.arange(size) for size in shape[:3])
    return batch[:, None, None, None], heads[:, None, None], rows[:, None]


def written_by_index(gate: Tensor, index: Tensor) -> Tensor:
    mask = torch.zeros(gate.shape, dtype=torch.bool)
    mask[(*counters(gate.shape), index)] = True
    return mask


def written_scores(gate: Tensor, index: Tensor) -> Tensor:
    mask = torch.full(gate.shape, -math.inf)
    mask[(*counters(gate.shape), index)] = 0.0
    return mask


def chosen(gate: Tensor, index: Tensor) -> Tensor:
    return torch.zeros_like(gate, dtype=torch.bool).scatter(-1, index, True)


#: Of the index of a top-k: the keys that it names.
WAYS: dict[str, Masked] = {
    "numbers": lambda g, i: torch.zeros_like(g).scatter(-1, i, 1.0).bool(),
    "whole numbers": lambda g, i: torch.zeros(g.shape, dtype=torch.int32).scatter_(-1, i, 1) > 0,
    "one": lambda g, i: torch.zeros_like(g).scatter_(-1, i, 1.0) == 1,
    "half": lambda g, i: torch.zeros_like(g).scatter_(-1, i, 1.0) >= 0.5,
    "keywords": lambda g, i: torch.scatter(torch.zeros_like(g), dim=-1, index=i, value=1).bool(),
    "scores": lambda g, i: torch.full_like(g, -math.inf).scatter(-1, i, 0.0),
    "scores of a source": lambda g, i: torch.full_like(g, -math.inf).scatter(
        -1, i, torch.zeros_like(i, dtype=g.dtype)
    ),
    "finite scores": lambda g, i: torch.full_like(g, -math.inf).scatter(-1, i, 0.0).isfinite(),
    "logarithm": lambda g, i: torch.zeros_like(g).scatter(-1, i, 1.0).log(),
    "expanded source": lambda g, i: (
        torch.zeros_like(g).scatter(-1, i, torch.tensor(1.0).expand(i.shape)) > 0
    ),
    "added up": lambda g, i: (
        torch.zeros_like(g).scatter_add(-1, i, torch.ones_like(i, dtype=g.dtype)) > 0
    ),
    "reduced": lambda g, i: (
        torch.zeros_like(g).scatter_reduce(-1, i, torch.ones_like(i, dtype=g.dtype), "amax") > 0
    ),
    "one-hot, any": lambda g, i: F.one_hot(i, g.shape[-1]).any(-2),
    "one-hot, any of bool": lambda g, i: F.one_hot(i, g.shape[-1]).bool().any(dim=-2),
    "one-hot, sum": lambda g, i: F.one_hot(i, g.shape[-1]).sum(-2).bool(),
    "one-hot, at least one": lambda g, i: F.one_hot(i, g.shape[-1]).sum(-2) >= 1,
    "one-hot, not none": lambda g, i: ~(F.one_hot(i, g.shape[-1]).sum(-2) == 0),
    "one-hot, numbers": lambda g, i: F.one_hot(i, g.shape[-1]).float().sum(-2) > 0.5,
    "one-hot, maximum": lambda g, i: F.one_hot(i, g.shape[-1]).amax(-2).to(torch.bool),
    "one-hot, maximum and where": lambda g, i: F.one_hot(i, g.shape[-1]).max(-2).values > 0,
    "one-hot, clamped": lambda g, i: F.one_hot(i, g.shape[-1]).sum(-2).clamp(max=1).bool(),
    "compared, keys first": lambda g, i: (torch.arange(g.shape[-1]) == i.unsqueeze(-1)).any(-2),
    "compared, keys before": lambda g, i: (
        torch.arange(g.shape[-1])[:, None] == i[..., None, :]
    ).any(-1),
    "compared, counted": lambda g, i: (
        (i.unsqueeze(-2) == torch.arange(g.shape[-1]).view(1, 1, 1, -1, 1)).sum(-1) != 0
    ),
    "different from all": lambda g, i: ~(i[..., None] != torch.arange(g.shape[-1])).all(-2),
    "written": written_by_index,
    "scores written": written_scores,
    "filled": lambda g, i: torch.zeros_like(g).masked_fill(~chosen(g, i), -math.inf),
    "where": lambda g, i: torch.where(chosen(g, i), 0.0, -math.inf),
    "of a sort": lambda g, i: chosen(g, g.sort(-1, descending=True).indices[..., :KEPT]),
    "of an argsort": lambda g, i: chosen(g, g.argsort(-1, descending=True)[..., :KEPT]),
}

#: Some entries do not count.
VALID: dict[str, Masked] = {
    "source": lambda g, i: torch.zeros_like(g, dtype=torch.bool).scatter(-1, i, i % 3 != 0),
    "added up": lambda g, i: torch.zeros_like(g).scatter_add(-1, i, (i % 3 != 0).float()) > 0,
    "one-hot": lambda g, i: (F.one_hot(i, g.shape[-1]).bool() & (i % 3 != 0).unsqueeze(-1)).any(-2),
    "by value": lambda g, i: torch.zeros_like(g, dtype=torch.bool).scatter(
        -1, i, g.topk(KEPT, -1).values > 0.5
    ),
}

#: From blocks to keys.
EXPANSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat_interleave": lambda m: m.repeat_interleave(BLOCK, -1),
    "expand, reshape": lambda m: m.unsqueeze(-1).expand(*m.shape, BLOCK).reshape(*m.shape[:3], -1),
    "expand, flatten": lambda m: m[..., None].expand(-1, -1, -1, -1, BLOCK).flatten(-2),
    "repeat, flatten": lambda m: m[..., None].repeat(1, 1, 1, 1, BLOCK).flatten(-2),
    "tile, view": lambda m: m[..., None].tile(BLOCK).view(*m.shape[:-1], -1),
    "stack": lambda m: torch.stack([m] * BLOCK, -1).flatten(-2),
    "ones": lambda m: (m[..., None] & torch.ones(BLOCK, dtype=torch.bool)).flatten(-2),
    "kron": lambda m: torch.kron(m.float(), torch.ones(1, BLOCK)).bool(),
    "index": lambda m: m[..., torch.arange(LENGTH) // BLOCK],
    "index_select": lambda m: m.index_select(-1, torch.arange(LENGTH) // BLOCK),
    "gather": lambda m: m.gather(-1, (torch.arange(LENGTH) // BLOCK).expand(*m.shape[:3], -1)),
    "take_along_dim": lambda m: torch.take_along_dim(
        m, (torch.arange(LENGTH) // BLOCK)[None, None, None], -1
    ),
}

#: Right, and only what the mask allows is visited; but the mask tensor of all pairs is made.
TENSORS: dict[str, tuple[Masked, str]] = {
    "rank": (lambda g, i: g.argsort(-1, descending=True).argsort(-1) < 9, "the mask tensor"),
}


def program(way: Masked) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        mask = way(gate, gate.topk(KEPT, -1).indices)
        own = mask & causal() if mask.dtype == torch.bool else None
        mask = mask.masked_fill(~causal(), -math.inf) if own is None else own
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return run


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_recognised(way: Masked) -> None:
    found = agree(program(way), *operands(), gate_of(HEADS, LENGTH))
    assert found.listed is not None, found.reason
    assert found.listed.unit_kv == 1
    assert str(found.listed.mask.predicate) == "kv <= q"


@pytest.mark.parametrize("way", VALID.values(), ids=VALID)
def test_some_entries_do_not_count(way: Masked) -> None:
    found = agree(program(way), *operands(), gate_of(HEADS, LENGTH))
    assert found.listed is not None, found.reason


@pytest.mark.parametrize("expand", EXPANSIONS.values(), ids=EXPANSIONS)
def test_blocks(expand: Callable[[Tensor], Tensor]) -> None:
    found = agree(
        program(lambda g, i: expand(chosen(g, i))), *operands(), gate_of(HEADS, LENGTH // BLOCK)
    )
    assert found.listed is not None, found.reason
    assert (found.listed.unit_q, found.listed.unit_kv) == (1, BLOCK)


@pytest.mark.parametrize(("way", "why"), TENSORS.values(), ids=TENSORS)
def test_left_as_a_tensor(way: Masked, why: str) -> None:
    gate = gate_of(HEADS, LENGTH).mul(3).round()  # with ties, of which a threshold keeps all
    found = agree(program(way), *operands(), gate)
    assert found.listed is None
    assert why in found.reason


def test_an_index_may_count_from_the_end_where_the_program_lets_it() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        mask = torch.zeros(BATCH, HEADS, LENGTH, LENGTH, dtype=torch.bool)
        mask[(*counters(mask.shape), index)] = True
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask & causal())

    index = torch.randint(-LENGTH, LENGTH, (BATCH, HEADS, LENGTH, 6))
    fast, args = Rewritten(), [arg.detach() for arg in operands()]
    torch.testing.assert_close(fast.compiled(run)(*args, index), run(*args, index))
    (found,) = fast.decisions
    assert isinstance(found, Plan)
    assert found.listed is not None, found.reason


def test_entries_that_are_equal_where_one_counts() -> None:
    """Which of them a scatter writes last is open: it stays the program's."""

    def run(q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        mask = torch.zeros(BATCH, HEADS, LENGTH, LENGTH, dtype=torch.bool)
        mask = mask.scatter(-1, index, valid)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask & causal())

    index = torch.randint(0, LENGTH, (BATCH, HEADS, LENGTH, 6))
    valid = torch.rand(index.shape) > 0.5
    fast, args = Rewritten(), [arg.detach() for arg in operands()]
    torch.testing.assert_close(fast.compiled(run)(*args, index, valid), run(*args, index, valid))
    (found,) = fast.decisions
    assert isinstance(found, Plan)
    assert found.listed is None


def test_a_float_index_is_compared_as_it_is() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        mask = (index[..., None] == torch.arange(LENGTH)).any(-2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask & causal())

    index = torch.randint(0, 2 * LENGTH, (BATCH, HEADS, LENGTH, 9)) / 2
    fast, args = Rewritten(), [arg.detach() for arg in operands()]
    torch.testing.assert_close(fast.compiled(run)(*args, index), run(*args, index))

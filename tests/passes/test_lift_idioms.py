"""The ways in which people write masks, lifted and compared with the masks at other lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from sparse_compile.expr import KV, Q
from sparse_compile.sites.site import LiftedMask
from tests.passes.lifting import attend, capture, eager, evaluated, lift, lifted, rebound

HEADS = 2
Mask = Callable[..., Tensor]


def inputs(batch: int, n: int, seed: int = 0) -> dict[str, Tensor]:
    """Every argument that an idiom may take."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(0, n // 2, (batch, 1), generator=generator)
    boundaries = torch.rand(batch, n, generator=generator) < 0.2
    starts = torch.where(boundaries, torch.arange(n), 0).cummax(-1).values
    return {
        "x": torch.randn(batch, HEADS, n, 4, generator=generator),
        "pad": (torch.arange(n) >= left).long(),
        "doc": boundaries.cumsum(-1),
        "pos": torch.arange(n) - starts,
        "keep": torch.rand(batch, n, generator=generator) < 0.7,
        "window": torch.randint(1, 9, (HEADS,), generator=generator),
    }


def hf_indices(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, n = x.shape[0], x.shape[2]
    q = (torch.arange(n) + 0)[None, None, :, None]
    k = (torch.arange(n) + 0)[None, None, None, :]
    return torch.arange(batch)[:, None, None, None], q, k


def m3_hf_causal(x: Tensor) -> Tensor:
    _, q, k = hf_indices(x)
    mask = q.new_ones((), dtype=torch.bool) & (k <= q).to(x.device)
    return mask.expand(x.shape[0], -1, x.shape[2], x.shape[2])


def m4_hf_padding(x: Tensor, pad: Tensor) -> Tensor:
    b, _, k = hf_indices(x)
    return m3_hf_causal(x) & pad.to(torch.bool)[b, k]


def m4_padding_by_broadcast(x: Tensor, pad: Tensor) -> Tensor:
    return pad[:, None, None, :] > 0


def m5_bidirectional(x: Tensor, pad: Tensor) -> Tensor:
    b, q, k = hf_indices(x)
    return (q >= 0) & pad.bool()[b, k]


def m6_sliding(x: Tensor) -> Tensor:
    _, q, k = hf_indices(x)
    return (k > q - 8) & (k <= q)


def m7_symmetric_local(x: Tensor) -> Tensor:
    _, q, k = hf_indices(x)
    return (q - k).abs() <= 4


def m8_chunked(x: Tensor, pad: Tensor) -> Tensor:
    b, q, k = hf_indices(x)
    left = (pad.cumsum(-1) == 0).sum(-1)
    same = (k - left[b]) // 8 == (q - left[b]) // 8
    return same & (k <= q) & pad.bool()[b, k]


def m8_chunked_constant(x: Tensor) -> Tensor:
    _, q, k = hf_indices(x)
    return torch.div(k, 8, rounding_mode="floor") == torch.div(q, 8, rounding_mode="floor")


def m8_strided(x: Tensor) -> Tensor:
    _, q, k = hf_indices(x)
    return ((q - k) % 4 == 0) & (k <= q)


def m9_packed_arange(x: Tensor) -> Tensor:
    b, q, k = hf_indices(x)
    pos = (torch.arange(x.shape[2]) + 0)[None].expand(x.shape[0], -1)
    return _packed(pos, b, q, k)


def m9_packed_positions(x: Tensor, pos: Tensor) -> Tensor:
    return _packed(pos, *hf_indices(x))


def _packed(pos: Tensor, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    seq = (torch.diff(pos, prepend=pos[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return (seq[b, q] == seq[b, k]) & (pos[b, k] <= pos[b, q])


def m9_documents(x: Tensor, doc: Tensor) -> Tensor:
    causal = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()
    return ((doc[:, :, None] == doc[:, None, :]) & causal)[:, None]


def m12_tril(x: Tensor) -> Tensor:
    return torch.tril(torch.ones(x.shape[2], x.shape[2])).view(1, 1, x.shape[2], x.shape[2]) == 1


def m12_triu_band(x: Tensor) -> Tensor:
    ones = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool)
    return ~(torch.triu(ones, 1) | torch.tril(ones, -8))


def m17_global_tokens(x: Tensor) -> Tensor:
    i = torch.arange(x.shape[2])
    mask = (i[None] - i[:, None]).abs() <= 2
    mask[:, :3] = True
    mask[:3] = True
    return mask


def m17_in_place(x: Tensor, keep: Tensor) -> Tensor:
    n = x.shape[2]
    i = torch.arange(n)
    mask = torch.zeros(x.shape[0], 1, n, n, dtype=torch.bool)
    mask |= i[None] <= i[:, None]
    mask &= i[None] > i[:, None] - 6
    mask.masked_fill_((i % 7 == 0)[:, None], True)
    mask.logical_and_(keep[:, None, None, :])
    mask[..., 0] = True
    return mask


def m17_loop(x: Tensor) -> Tensor:
    n = x.shape[2]
    mask = torch.zeros(n, n, dtype=torch.bool)
    for start in range(0, 16, 4):
        mask[start : start + 4, : start + 4] = True
    return mask


def m17_through_a_view(x: Tensor) -> Tensor:
    mask = torch.zeros(x.shape[2], x.shape[2], dtype=torch.bool)
    mask.view(-1)[:: x.shape[2] + 1] = True
    mask.t()[2].fill_(True)
    mask.diagonal(1).logical_not_()
    return mask


def m17_index_list(x: Tensor) -> Tensor:
    n = x.shape[2]
    mask = torch.eye(n, dtype=torch.bool)
    mask[:, torch.arange(2, 5)] = True
    mask[torch.arange(n) < 2] = True
    mask.fill_diagonal_(False)
    return mask


def m18_vmap(x: Tensor, pad: Tensor) -> Tensor:
    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & pad.bool()[b, k]

    over_k = torch.vmap(allowed, (None, None, None, 0))
    over_q = torch.vmap(over_k, (None, None, 0, None))
    over_h = torch.vmap(over_q, (None, 0, None, None))
    over_b = torch.vmap(over_h, (0, None, None, None))
    i = torch.arange(x.shape[2])
    with TransformGetItemToIndex():
        return over_b(torch.arange(x.shape[0]), torch.arange(1), i, i)


def m19_numpy(x: Tensor) -> Tensor:
    return torch.as_tensor(np.tril(np.ones((16, 16), dtype=bool)))


def m20_literal_blocks(x: Tensor) -> Tensor:
    blocks = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 0, 1]]).bool()
    return blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)


def m20_kron(x: Tensor) -> Tensor:
    return torch.kron(torch.eye(4), torch.ones(4, 4)).bool()


def m22_window_per_head(x: Tensor, window: Tensor) -> Tensor:
    i = torch.arange(x.shape[2])
    return (i[:, None] - i).abs()[None] < window[:, None, None]


def prefix_lm(x: Tensor, doc: Tensor) -> Tensor:
    i = torch.arange(x.shape[2])
    prefix = doc[:, :1, None, None].clamp(max=5) + 3
    return (i[None] < prefix) | (i[None] <= i[:, None])


def axial(x: Tensor) -> Tensor:
    i = torch.arange(x.shape[2])
    row, column = i // 4, i % 4
    return (row[:, None] == row) | (column[:, None] == column)


def tiled(x: Tensor) -> Tensor:
    rows = torch.arange(x.shape[2]).view(-1, 4)
    tile = (rows // 8).flip(0).flip(0).reshape(-1)
    return tile[:, None] == tile.roll(0, 0)[None]


def min_max_clamp(x: Tensor) -> Tensor:
    i = torch.arange(x.shape[2], dtype=torch.int32)
    low = torch.clamp(i - 3, min=0)
    high = torch.minimum(i + 2, torch.full_like(i, 12)).clamp(max=14)
    return (i[None] >= low[:, None]) & (i[None] <= torch.maximum(high, i)[:, None])


def float_distance(x: Tensor) -> Tensor:
    i = torch.arange(x.shape[2]).float()
    return (i[:, None] - i[None]).abs() < 4.5


def stacked_and_cut(x: Tensor) -> Tensor:
    n = x.shape[2]
    i = torch.arange(n)
    causal, local = i[None] <= i[:, None], (i[None] - i[:, None]).abs() < 3
    heads = torch.stack([causal, local])
    joined = torch.cat([heads[:, :4].logical_not(), heads[:, 4:]], dim=1)
    first, second = joined.unbind(0)
    return torch.stack([first ^ second, second])


#: Idioms, and the lengths that their own code allows.
IDIOMS: list[tuple[Mask, tuple[int, ...]]] = [
    (mask, (16,) if mask.__name__ in ("m19_numpy", "m20_literal_blocks", "m20_kron") else (24, 40))
    for mask in (
        m3_hf_causal,
        m4_hf_padding,
        m4_padding_by_broadcast,
        m5_bidirectional,
        m6_sliding,
        m7_symmetric_local,
        m8_chunked,
        m8_chunked_constant,
        m8_strided,
        m9_packed_arange,
        m9_packed_positions,
        m9_documents,
        m12_tril,
        m12_triu_band,
        m17_global_tokens,
        m17_in_place,
        m17_loop,
        m17_index_list,
        m18_vmap,
        m19_numpy,
        m20_literal_blocks,
        m20_kron,
        m22_window_per_head,
        prefix_lm,
        axial,
        tiled,
        min_max_clamp,
        float_distance,
        stacked_and_cut,
    )
]
NAMES = [mask.__name__ for mask, _ in IDIOMS]


def arguments(mask: Mask) -> tuple[str, ...]:
    code = mask.__code__
    return code.co_varnames[: code.co_argcount]


def check(found: LiftedMask, captured: Any, mask: Mask, batch: int, n: int, seed: int) -> None:
    given = {name: inputs(batch, n, seed)[name] for name in arguments(mask)}
    shape = (batch, HEADS, n, n)
    expected = mask(**given).expand(shape)
    actual = evaluated(found, rebound(captured, given), shape)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("mask", [mask for mask, _ in IDIOMS], ids=NAMES)
def test_static(mask: Mask) -> None:
    given = inputs(2, 16)
    captured = capture(_named(mask), *(given[name] for name in arguments(mask)))
    found = lift(captured)
    assert isinstance(found, LiftedMask), found
    check(found, captured, mask, batch=2, n=16, seed=5)


@pytest.mark.parametrize("mask,lengths", IDIOMS, ids=NAMES)
def test_dynamic_holds_at_other_lengths(mask: Mask, lengths: tuple[int, ...]) -> None:
    # Sizes that differ from each other, since torch.compile takes equal ones to stay equal.
    given = inputs(3, 16 if lengths == (16,) else 20)
    captured = capture(_named(mask), *(given[name] for name in arguments(mask)), dynamic=True)
    found = lift(captured)
    assert isinstance(found, LiftedMask), found
    for seed, n in enumerate(lengths):
        check(found, captured, mask, batch=5, n=n, seed=seed)


def _named(mask: Mask) -> Callable[..., Tensor]:
    """A function whose arguments have the names of the mask's, so that inputs can be told apart."""
    names = ", ".join(arguments(mask))
    scope = {"attend": attend, "mask": mask}
    return eval(f"lambda {names}: attend(x, mask({names}))", scope)  # type: ignore[no-any-return]


def padded(x: Tensor, pad: Tensor) -> Tensor:
    n = x.shape[2]
    i, around = torch.arange(n - 3), torch.nn.functional.pad
    band = around(i[None] <= i[:, None], (2, 1, 0, 3), value=True)
    added = torch.zeros(2, n - 2).masked_fill(pad[:, 1:-1] == 0, -torch.inf)
    return band & (around(added, (1, 1)) == 0)[:, None, None] & around(band, (-1, 1))


def test_padding_and_cropping() -> None:
    """With sizes that are known: a trace of them makes others known, too."""
    given = inputs(2, 16)
    captured = capture(_named(padded), given["x"], given["pad"])
    found = lift(captured)
    assert isinstance(found, LiftedMask), found
    check(found, captured, padded, batch=2, n=16, seed=5)
    assert found.mask.tables == ("bool",)


def test_writes_through_views() -> None:
    captured = capture(lambda x: attend(x, m17_through_a_view(x)), inputs(2, 16)["x"])
    found = lift(captured)
    assert isinstance(found, LiftedMask), found
    expected = m17_through_a_view(inputs(2, 16)["x"]).expand(2, HEADS, 16, 16)
    torch.testing.assert_close(evaluated(found, {}, (2, HEADS, 16, 16)), expected)


FORMS: list[Callable[..., Tensor]] = [
    lambda x, m: attend(x, torch.where(m, 0.0, float("-inf"))),
    lambda x, m: attend(x, torch.zeros(m.shape).masked_fill_(~m, torch.finfo(x.dtype).min)),
    lambda x, m: attend(x, (1 - m.float()) * torch.finfo(x.dtype).min),
    lambda x, m: eager(x, lambda s: s.masked_fill(~m, float("-inf"))),
    lambda x, m: eager(x, lambda s: s.masked_fill(m.logical_not(), torch.finfo(x.dtype).min)),
    lambda x, m: eager(x, lambda s: torch.where(m, s, float("-inf"))),
    lambda x, m: eager(x, lambda s: s + torch.where(m, 0.0, torch.finfo(x.dtype).min)),
    lambda x, m: eager(x, lambda s: s.masked_fill(m.float() == 0, float("-inf"))),
    lambda x, m: eager(x, lambda s: s.masked_fill((m.float() - 1).bool(), float("-inf"))),
    lambda x, m: eager(x, lambda s: s.masked_fill(torch.where(m, 0.0, -1e4) < -1, -3.4e38)),
]
POLARISED = [m4_hf_padding, m6_sliding, m9_documents, m17_in_place]


@functools.cache
def as_bool(mask: Mask) -> sympy.Basic:
    """The predicate of a mask that is given to SDPA as it is."""
    args = [inputs(2, 16)[name] for name in arguments(mask)]
    return lifted(lambda *a: attend(a[0], mask(*a)), *args).mask.predicate


@pytest.mark.parametrize("more", [0, 1])  # each form with two masks, each of these in turn
@pytest.mark.parametrize("number", range(len(FORMS)))
def test_every_polarity(number: int, more: int) -> None:
    form, mask = FORMS[number], POLARISED[(number + more) % len(POLARISED)]
    args = [inputs(2, 16)[name] for name in arguments(mask)]
    found = lifted(lambda *a: form(a[0], mask(*a)), *args)
    assert found.mask.predicate == as_bool(mask)


def test_causal_is_spelled_the_same_however_written() -> None:
    x = inputs(2, 16)["x"]
    forms = [m3_hf_causal, m9_packed_arange, m12_tril]
    predicates = {lifted(lambda x, m=m: attend(x, m(x)), x).mask.predicate for m in forms}
    additive = lifted(lambda x: attend(x, torch.full((16, 16), float("-inf")).triu(1)), x)
    flag = lifted(
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True), x
    )
    assert predicates == {KV <= Q} == {additive.mask.predicate} == {flag.mask.predicate}


def test_is_causal_and_a_mask_are_both_applied() -> None:
    given = inputs(2, 16)
    found = lifted(
        lambda x, pad: attend(x, pad.bool()[:, None, None], is_causal=True),
        given["x"],
        given["pad"],
    )
    assert str(found.mask) == "(kv <= q) & Ne(t0(b, kv), 0)"


def test_packed_chain_over_an_arange_leaves_no_table() -> None:
    x = inputs(2, 16)["x"]
    for dynamic in (False, True):
        found = lifted(lambda x: attend(x, m9_packed_arange(x)), x, dynamic=dynamic)
        assert found.mask.predicate == (KV <= Q)
        assert found.program is None


def test_queries_and_keys_share_one_table_of_documents() -> None:
    given = inputs(2, 16)
    found = lifted(
        lambda x, doc: attend(x, (doc[:, :, None] == doc[:, None])[:, None]),
        given["x"],
        given["doc"],
    )
    assert str(found.mask) == "Eq(t0(b, kv), t0(b, q))"
    assert found.mask.tables == ("int64",)


def test_chunks_keep_their_structure() -> None:
    given = inputs(2, 16)
    found = lifted(lambda x, pad: attend(x, m8_chunked(x, pad)), given["x"], given["pad"])
    assert "FloorDiv(kv - t0(b), 8)" in str(found.mask)


# Lengths that differ, offsets ----------------------------------------------------------------


def cross(q: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, kv, kv, attn_mask=mask)


@pytest.mark.parametrize("dynamic", [False, True])
def test_lower_right_causal(dynamic: bool) -> None:
    def run(q: Tensor, kv: Tensor) -> Tensor:
        n_q, n_kv = q.shape[2], kv.shape[2]
        i, j = torch.arange(n_q) + (n_kv - n_q), torch.arange(n_kv)
        return cross(q, kv, j[None] <= i[:, None])

    q, kv = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 16, 4)
    captured = capture(run, q, kv, dynamic=dynamic)
    found = lift(captured)
    assert isinstance(found, LiftedMask), found
    assert not found.mask.tables
    assert found.mask.n_sizes == 0
    for n_q, n_kv in [(5, 16)] + ([(7, 30), (3, 9)] if dynamic else []):
        expected = torch.arange(n_kv)[None] <= torch.arange(n_q)[:, None] + (n_kv - n_q)
        actual = evaluated(found, {}, (1, 2, n_q, n_kv))
        torch.testing.assert_close(actual, expected.expand(1, 2, n_q, n_kv))


def test_static_cache_offset_is_a_table_without_dimensions() -> None:
    def decode(q: Tensor, kv: Tensor, seen: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2]) + seen, torch.arange(kv.shape[2])
        return cross(q, kv, j[None] <= i[:, None])

    q, kv = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 16, 4)
    captured = capture(decode, q, kv, torch.tensor(6))
    found = lift(captured)
    assert isinstance(found, LiftedMask), found
    assert "t0()" in str(found.mask)
    for seen in (0, 9):
        values = rebound(captured, {"q": q, "kv": kv, "seen": torch.tensor(seen)})
        expected = (torch.arange(16) <= seen).expand(1, 2, 1, 16)
        torch.testing.assert_close(evaluated(found, values, (1, 2, 1, 16)), expected)


def test_integer_offsets_are_sizes() -> None:
    def decode(q: Tensor, kv: Tensor, pad: Tensor, start: int) -> Tensor:
        i = torch.arange(q.shape[2]) + start
        j = torch.arange(kv.shape[2]) + max(0, start - 7)
        return cross(q, kv, (j[None] <= i[:, None]) & pad.bool()[:, None, None][..., j])

    q, kv, pad = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 8, 4), torch.ones(1, 40).long()
    pad[:, :3] = 0
    captured = capture(decode, q, kv, pad, 9, dynamic=True)
    found = lift(captured)
    assert isinstance(found, LiftedMask), found
    assert found.mask.n_sizes == 1
    values = rebound(captured, {"q": q, "kv": kv, "pad": pad}, number=11)
    actual = evaluated(found, values, (1, 2, 3, 8))
    i, j = torch.arange(3) + 11, torch.arange(8) + 4
    expected = (j[None] <= i[:, None]) & pad.bool()[0, j]
    torch.testing.assert_close(actual, expected.expand(1, 2, 3, 8))

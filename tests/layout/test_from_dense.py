"""Dense masks: blocks and bits against the definition, the cache, and the kernel without a GPU."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile.errors import BadPattern
from sparse_compile.expr import evaluate
from sparse_compile.layout import from_dense, tensor_state
from sparse_compile.layout.from_dense import DenseBlocks, dense_layout, remembered
from tests.layout.dense_cases import CASES, DenseCase, check_pass, expected_kinds
from tests.layout.test_build import check_lists, check_transpose

CPU = torch.device("cpu")


def read(found: DenseBlocks) -> Tensor:
    """What the predicate and the tables of a mask say."""
    outer, (n_q, n_kv) = found.table.shape[:2], (found.layout.n_q, found.layout.n_kv)
    where = {"q": torch.arange(n_q)[:, None], "kv": torch.arange(n_kv)}
    where["b"], where["h"] = torch.meshgrid(*map(torch.arange, outer), indexing="ij")
    where["b"], where["h"] = where["b"][..., None, None], where["h"][..., None, None]
    return evaluate(found.expr, where, n_q, n_kv, [found.table]).expand(*outer, n_q, n_kv)


def check_dense(mask: Tensor, block: tuple[int, int]) -> DenseBlocks:
    found = dense_layout(mask, *block)
    four = mask[(None,) * (4 - mask.dim())]
    attends = four if mask.dtype == torch.bool else four != float("-inf")
    layout = found.layout
    kinds = layout.kinds().unflatten(0, (layout.batches, layout.heads))
    expected = expected_kinds(attends, block).unflatten(0, attends.shape[:2])
    assert torch.equal(kinds.expand(expected.shape), expected)
    assert torch.equal(read(found).expand(attends.shape), attends)
    check_lists(layout)
    check_transpose(layout)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_pass_finds_bits_and_kinds(case: DenseCase) -> None:
    mask = case.mask(CPU)
    check_pass(from_dense.read_dense_in_torch(mask, *case.block), mask, case.block)
    check_dense(mask, case.block)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 90),
    st.sampled_from([8, 13, 16, 32]),
    st.sampled_from([8, 24, 32, 64]),
    st.sampled_from([(), (3,), (1, 1), (2, 1), (1, 3), (2, 2)]),
    st.integers(0, 1 << 30),
)
def test_random_masks(
    n_q: int, n_kv: int, block_q: int, block_kv: int, outer: tuple[int, ...], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(*outer, -(-n_q // 10), -(-n_kv // 10), generator=generator) < 0.4
    mask = coarse.repeat_interleave(10, -1).repeat_interleave(10, -2)[..., :n_q, :n_kv]
    found = check_dense(mask, (block_q, block_kv))
    found.check()
    layout = found.layout
    again = layout.unpacked(layout.pack())
    assert torch.equal(again.kinds(), layout.kinds())


def test_bands_of_rows_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    case = DenseCase(90, 70, heads=2, dtype=torch.float32, bias=1.0)
    monkeypatch.setattr(from_dense, "_ENTRIES_AT_ONCE", 16 * 70 * 2 * 2)
    check_dense(case.mask(CPU), case.block)
    assert dense_layout(case.mask(CPU), *case.block).biased


def test_expanded_dimensions_share_one_class() -> None:
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril().expand(4, 8, 40, 40)
    found = check_dense(mask, (16, 16))
    assert found.layout.classes == 1
    assert str(found.expr.lookups[0]) == "t0(0, 0, q, FloorDiv(kv, 32))"
    padding = torch.rand(3, 1, 1, 40) < 0.5
    found = check_dense(padding.expand(3, 5, 20, 40), (16, 16))
    assert (found.layout.batches, found.layout.heads) == (3, 1)
    assert str(found.expr.lookups[0]) == "t0(b, 0, q, FloorDiv(kv, 32))"


@pytest.mark.parametrize("shape", [(0, 16), (16, 0), (0, 0)])
def test_no_tokens(shape: tuple[int, int]) -> None:
    found = dense_layout(torch.zeros(2, 1, *shape, dtype=torch.bool), 8, 8)
    assert found.layout.nnz_blocks == 0
    check_lists(found.layout)


@pytest.mark.parametrize("bias", [1.0, -1e9, float("inf"), float("nan")])
def test_a_bias_is_no_mask(bias: float) -> None:
    mask = torch.zeros(32, 32).masked_fill(torch.ones(32, 32).triu(1).bool(), float("-inf"))
    dense_layout(mask, 16, 16).check()
    mask[20, 3] = bias
    found = dense_layout(mask, 16, 16)
    assert int(found.layout.kinds()[0, 1, 0]) == 2, "a bias attends"
    with pytest.raises(BadPattern, match="is a bias"):
        found.check()


@pytest.mark.parametrize("mask", [torch.ones(4), torch.ones(1, 1, 1, 4, 4), torch.ones(4, 4).int()])
def test_what_is_no_mask_is_refused(mask: Tensor) -> None:
    with pytest.raises(BadPattern, match="Write"):
        dense_layout(mask, 16, 16)


def test_bytes_that_are_neither_0_nor_1() -> None:
    odd = torch.tensor([[0, 1, 2, 128, 255, 0, 7, 64] * 8] * 8, dtype=torch.uint8)
    words = dense_layout(odd.view(torch.bool), 8, 32).words
    assert torch.equal(words, dense_layout(odd != 0, 8, 32).words)


def kept(mask: Tensor, *block: int) -> DenseBlocks:
    """The blocks of a mask that is stable."""
    return remembered(mask, block, lambda: dense_layout(mask, *block))


def test_the_cache_follows_the_tensor() -> None:
    mask = torch.ones(64, 64, dtype=torch.bool).tril()
    first = kept(mask, 16, 16)
    assert kept(mask, 16, 16) is first
    assert kept(mask, 32, 16) is not first
    assert kept(mask, 16, 16) is first
    assert kept(mask.clone(), 16, 16) is not first
    assert kept(mask[:, :32], 16, 16).layout.n_kv == 32
    assert kept(mask, 16, 16) is first
    mask[:16] = False
    changed = kept(mask, 16, 16)
    assert int(changed.layout.kinds()[0, 0].sum()) == 0
    mask.t_()
    assert int(kept(mask, 16, 16).layout.kinds()[0, :, 0].sum()) == 0
    mask.set_(torch.ones(8, 8, dtype=torch.bool))
    assert kept(mask, 16, 16).layout.n_q == 8


def test_the_cache_refers_to_no_tensor() -> None:
    mask, other = torch.ones(64, 64, dtype=torch.bool).tril(), torch.zeros(64, 64).bool()
    first = kept(mask, 16, 16)
    assert not weakref.getweakrefs(mask)
    mask.data, other.data = other.data, mask.data
    assert kept(mask, 16, 16).layout.nnz_blocks == 0
    assert kept(other, 16, 16).layout.nnz_blocks == first.layout.nnz_blocks


def test_the_cache_keeps_nothing_alive() -> None:
    gc.collect()
    before = len(tensor_state._MEMORIES)
    mask = torch.ones(64, 64, dtype=torch.bool)
    found = kept(mask, 16, 16)
    assert len(tensor_state._MEMORIES) == before + 1
    del mask
    assert len(tensor_state._MEMORIES) == before
    assert found.layout.nnz_blocks == 16


def test_inference_tensors_are_read_every_time() -> None:
    with torch.inference_mode():
        mask = torch.ones(64, 64, dtype=torch.bool)
        first = kept(mask, 16, 16)
        mask[:16] = False
        assert kept(mask, 16, 16).layout.nnz_blocks == 12
    assert first.layout.nnz_blocks == 16


DTYPES = {
    **{"bools in fours": "int32", "bools": "uint8"},
    **{"bfloat16": "bfloat16", "float32": "float32"},
}


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        *((name, 90) for name in DTYPES),
        *((n, a) for n in ("bools in fours", "bfloat16") for a in (80, 100)),
    ],
)
def test_the_kernel_compiles(name: str, arch: int) -> None:
    """Without a GPU: no spilled registers, and wide loads."""
    pytest.importorskip("triton")
    from sparse_compile.codegen.triton.aot import compiled
    from sparse_compile.codegen.triton.layout.dense_kernel import read_kernel

    kernel = read_kernel(DTYPES[name], fours=name == "bools in fours")
    used = compiled(kernel, arch).resources["read_mask"]
    assert used.registers <= 128
    assert used.spills == 0
    assert used.ptx.count("ld.global.v4") == used.ptx.count("ld.global") > 0


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_kernels_that_list_compile(arch: int) -> None:
    pytest.importorskip("triton")
    from sparse_compile.codegen.triton.aot import compiled
    from sparse_compile.codegen.triton.layout.compact_kernel import COMPACT

    found = compiled(COMPACT, arch).resources
    assert set(found) == {"count_blocks", "list_blocks"}
    assert all(used.spills == 0 for used in found.values())

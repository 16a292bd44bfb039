"""Layouts to other formats and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from sparse_compile.errors import BadPattern
from sparse_compile.expr import KV, B, H, MaskExpr, Q, table
from sparse_compile.layout import EMPTY, FULL, PARTIAL, BlockLayout, build_layout, picture
from sparse_compile.layout.interop.interchange import (
    from_block_mask,
    from_coo,
    from_deepspeed,
    from_torch_sparse,
    to_block_mask,
    to_coo,
    to_torch_sparse,
)
from sparse_compile.layout.superset import Problem, ProblemShape
from sparse_compile.spec.view import Order
from tests.layout.test_build import check_lists, check_transpose

T0 = table(0)


@dataclass(frozen=True)
class RandomLayout:
    """The kinds of all blocks, drawn at random."""

    n_q: int
    n_kv: int
    block: tuple[int, int]
    batches: int
    heads: int
    seed: int
    density: float

    def kinds(self) -> Tensor:
        """int8 [classes, rows, cols]; blocks that stick out are never FULL."""
        generator = torch.Generator().manual_seed(self.seed)
        rows, cols = -(-self.n_q // self.block[0]), -(-self.n_kv // self.block[1])
        shape = (self.batches * self.heads, rows, cols)
        visited = torch.rand(shape, generator=generator) < self.density
        kinds = torch.randint(PARTIAL, FULL + 1, shape, generator=generator) * visited
        if self.n_q % self.block[0]:
            kinds[:, -1].clamp_(max=PARTIAL)
        if self.n_kv % self.block[1]:
            kinds[:, :, -1].clamp_(max=PARTIAL)
        return kinds.to(torch.int8)

    def layout(self) -> BlockLayout:
        """By from_coo, from a shuffled list."""
        kinds = self.kinds()
        classes, q, kv = kinds.nonzero().unbind(1)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(q.numel(), generator=generator)
        return from_coo(
            q[order],
            kv[order],
            kinds[classes, q, kv][order],
            self.n_q,
            self.n_kv,
            self.block,
            batches=self.batches,
            heads=self.heads,
            classes=classes[order],
        )


def layouts() -> st.SearchStrategy[RandomLayout]:
    length, block, classes = st.integers(1, 90), st.sampled_from([8, 13, 16]), st.integers(1, 3)
    blocks = st.tuples(block, block)
    density = st.sampled_from([0.0, 0.2, 0.7, 1.0])
    return st.builds(
        RandomLayout, length, length, blocks, classes, classes, st.integers(0, 999), density
    )


def equal(left: BlockLayout, right: BlockLayout) -> bool:
    same = [(layout.n_q, layout.n_kv, layout.q, layout.kv) for layout in (left, right)]
    classes = [(layout.batches, layout.heads) for layout in (left, right)]
    lists = zip(
        (*left.rows.tensors(), *left.cols.tensors()),
        (*right.rows.tensors(), *right.cols.tensors()),
        strict=True,
    )
    # What was packed may have more room than its lines.
    alike = all(torch.equal(a, b[..., : a.shape[-1]]) for a, b in lists)
    return same[0] == same[1] and classes[0] == classes[1] and alike


@settings(max_examples=150, deadline=None)
@given(layouts())
def test_a_list_of_blocks_and_back(case: RandomLayout) -> None:
    layout = case.layout()
    assert torch.equal(layout.kinds(), case.kinds())
    check_lists(layout)
    check_transpose(layout)
    assert equal(layout, layout.unpacked(layout.pack()))
    visited = to_coo(layout)
    assert torch.equal(torch.stack(visited[:3], 1), case.kinds().nonzero())
    shape = {"batches": case.batches, "heads": case.heads, "classes": visited.classes}
    back = from_coo(*visited[1:], case.n_q, case.n_kv, case.block, **shape)
    assert equal(back, layout)


@settings(max_examples=100, deadline=None)
@given(layouts(), st.sampled_from(["coo", "csr", "bsr"]))
def test_torch_sparse_and_back(case: RandomLayout, format: str) -> None:
    layout, kinds = case.layout(), case.kinds()
    ragged = case.n_q % case.block[0] or case.n_kv % case.block[1]
    if format == "bsr" and ragged:
        with pytest.raises(BadPattern, match="no ragged blocks"):
            to_torch_sparse(layout, format, 0)
        return
    for c in range(layout.classes):
        tensor = to_torch_sparse(layout, format, c)
        dense = tensor.to_dense()
        if format == "bsr":
            back = from_torch_sparse(tensor)
            dense = dense[:: case.block[0], :: case.block[1]]
        else:
            back = from_torch_sparse(tensor, case.n_q, case.n_kv, case.block)
        assert torch.equal(dense, kinds[c])
        assert torch.equal(back.kinds()[0], kinds[c])
        assert picture(back) == picture(layout, index=c)


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_block_mask_and_back(case: RandomLayout) -> None:
    layout = case.layout()
    block_mask = to_block_mask(layout, lambda b, h, q, kv: kv <= q)
    assert block_mask.shape == (case.batches, case.heads, case.n_q, case.n_kv)
    assert torch.equal(block_mask.to_dense().flatten(0, 1).bool(), case.kinds() != EMPTY)
    assert equal(from_block_mask(block_mask), layout)
    block_mask.kv_indices[...] = torch.where(
        torch.arange(block_mask.kv_indices.shape[-1]) < block_mask.kv_num_blocks[..., None],
        block_mask.kv_indices,
        -77,
    )
    assert equal(from_block_mask(block_mask), layout), "what stands behind the count was read"


WINDOW, DOCUMENTS = 40, (torch.arange(128) // 48).expand(2, -1).contiguous()
MASKS: dict[str, tuple[Any, sympy.Basic, int | None, int | None]] = {
    "causal": (lambda b, h, q, kv: kv <= q, KV <= Q, None, None),
    "window": (
        lambda b, h, q, kv: (kv <= q) & (q - kv < WINDOW),
        (KV <= Q) & (Q - KV < WINDOW),
        None,
        None,
    ),
    "documents": (
        lambda b, h, q, kv: (kv <= q) & (DOCUMENTS[b, q] == DOCUMENTS[b, kv]),
        (KV <= Q) & sympy.Eq(T0(B, Q), T0(B, KV)),
        2,
        None,
    ),
    "heads": (lambda b, h, q, kv: q - kv < 16 * h, Q - KV < 16 * H, None, 3),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("lengths", [(128, 128), (96, 128), (100, 90)])
def test_flex_attention_finds_the_same_blocks(name: str, lengths: tuple[int, int]) -> None:
    mask_mod, predicate, batch, heads = MASKS[name]
    theirs = create_block_mask(mask_mod, batch, heads, *lengths, device="cpu", BLOCK_SIZE=16)
    dtypes = ("int64",) if name == "documents" else ()
    ours = build_layout(
        Problem.of(
            MaskExpr(predicate, dtypes),
            ProblemShape(batch or 1, heads or 1, lengths[0], lengths[1]),
            (16, 16),
        ),
        [DOCUMENTS] * len(dtypes),
    )
    found = from_block_mask(theirs)
    assert torch.equal(found.kinds(), ours.kinds())
    assert (found.batches, found.heads) == (ours.batches, ours.heads)
    converted = to_block_mask(ours, mask_mod)
    assert torch.equal(converted.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(converted.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert torch.equal(converted.q_num_blocks, theirs.q_num_blocks)
    assert torch.equal(converted.to_dense(), theirs.to_dense())
    assert converted.mask_mod is mask_mod


def test_a_block_mask_without_full_blocks() -> None:
    theirs = create_block_mask(
        MASKS["causal"][0], None, None, 64, 64, device="cpu", BLOCK_SIZE=(16, 32)
    )
    theirs.kv_num_blocks += theirs.full_kv_num_blocks
    theirs.kv_indices.copy_(torch.tensor([0, 1]))
    theirs.full_kv_num_blocks = theirs.full_kv_indices = None
    assert from_block_mask(theirs).kinds().tolist() == [[[1, 0], [1, 0], [1, 1], [1, 1]]]


def test_a_list_without_kinds_is_full_but_for_ragged_edges() -> None:
    layout = from_coo([0, 1, 1], [0, 0, 1], None, 20, 20, 16)
    assert layout.kinds().tolist() == [[[2, 0], [1, 1]]]
    ragged = from_coo([1], [1], [FULL], 20, 20, 16)
    assert ragged.kinds().tolist() == [[[0, 0], [0, 1]]]


def test_a_list_in_another_order_of_tokens() -> None:
    residues = Order((4, 1), (3,), (1, 0))
    layout = from_coo([0, 1, 2], [0, 1, 2], None, 11, 11, (residues, residues))
    assert layout.grid == (3, 3)
    assert layout.kinds()[0].diagonal().tolist() == [2, 2, 1]
    assert equal(from_torch_sparse(to_torch_sparse(layout), 11, 11, residues), layout)
    with pytest.raises(BadPattern, match="consecutive tokens"):
        to_block_mask(layout, lambda b, h, q, kv: kv <= q)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 0], [1, 1], None, 32, 32, 16), r"\(q 0, kv 1\) of class 0 is listed twice"),
        (([0, 0], [1, 1], [1, 2], 32, 32, 16), "listed twice"),
        (([2], [0], None, 32, 32, 16), "q_blocks holds 2, outside 0 to 1"),
        (([0], [-1], None, 32, 32, 16), "kv_blocks holds -1"),
        (([0], [0], [0], 32, 32, 16), "kinds holds 0"),
        (([0], [0, 1], None, 32, 32, 16), "kv_blocks has shape"),
        (([0], [0], None, 32, 32, 0), "no block shape"),
        (([0], [0], None, 32, 32, (16, 16, 16)), "no block shape"),
    ],
)
def test_lists_that_make_no_layout(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(BadPattern, match=message):
        from_coo(*arguments)


@pytest.mark.parametrize(("classes", "message"), [(None, "classes=b"), ([2], "classes holds 2")])
def test_classes_that_make_no_layout(classes: list[int] | None, message: str) -> None:
    with pytest.raises(BadPattern, match=message):
        from_coo([0], [0], None, 32, 32, 16, batches=2, heads=1, classes=classes)


def test_the_same_block_in_two_classes_is_no_duplicate() -> None:
    layout = from_coo([0, 0], [1, 1], None, 32, 32, 16, batches=2, heads=1, classes=[0, 1])
    assert layout.kinds().tolist() == [[[0, 2], [0, 0]]] * 2


@pytest.mark.parametrize("lengths", [(0, 16), (16, 0), (0, 0)])
def test_no_tokens(lengths: tuple[int, int]) -> None:
    layout = from_coo([], [], None, *lengths, 8)
    check_lists(layout)
    assert to_coo(layout).kinds.numel() == 0


def test_torch_sparse_masks_that_others_made() -> None:
    """Values that are no kinds: anything but zero attends."""
    mask = torch.ones(32, 32).tril() * 0.5
    bsr = mask.to_sparse_bsr((16, 16))
    assert from_torch_sparse(bsr).kinds().tolist() == [[[1, 0], [2, 1]]]
    assert from_torch_sparse(bsr.bool(), 32, 32, 16).kinds().tolist() == [[[1, 0], [2, 1]]]
    zero = torch.sparse_coo_tensor([[0, 1], [0, 1]], [0.0, 3.0], (2, 2), check_invariants=True)
    assert from_torch_sparse(zero, 32, 32, 16).kinds().tolist() == [[[0, 0], [0, 2]]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_torch_sparse(torch.eye(2), 32, 32, 16), "in COO, CSR or BSR"),
        (lambda: from_torch_sparse(torch.eye(2).to_sparse()), "how large they are"),
        (lambda: from_torch_sparse(torch.eye(3).to_sparse(), 32, 32, 16), "does not cover"),
        (lambda: from_torch_sparse(torch.eye(2).char().mul(3).to_sparse(), 2, 2, 1), "holds kinds"),
        (lambda: from_torch_sparse(torch.eye(4).to_sparse_bsr((2, 2)), 4, 4, 4), "Leave out"),
        (lambda: to_torch_sparse(from_coo([], [], None, 8, 8, 8), "csc"), "Write one of"),
        (lambda: to_torch_sparse(RandomLayout(8, 8, (8, 8), 2, 1, 0, 1).layout()), "Write index="),
        (lambda: from_deepspeed(torch.ones(2, 2), 16), "make_layout"),
    ],
)
def test_what_cannot_be_converted(call: Any, message: str) -> None:
    with pytest.raises(BadPattern, match=message):
        call()


def test_deepspeed_layouts() -> None:
    """Heads of their own, or one class for equal heads."""
    one = torch.tensor([[1, 0], [1, 1]])
    shared = from_deepspeed(one.expand(4, 2, 2), 16)
    assert (shared.heads, shared.n_q, shared.n_kv) == (1, 32, 32)
    assert shared.kinds().tolist() == [[[2, 0], [2, 2]]]
    different = from_deepspeed(torch.stack([one, one.T]), 16)
    assert different.heads == 2
    assert different.kinds().tolist() == [[[2, 0], [2, 2]], [[2, 2], [0, 2]]]

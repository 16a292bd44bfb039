"""Bad parameters, and patterns that do not fit the lengths, are told in one clear line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sparse_compile import patterns as P
from sparse_compile.errors import BadPattern

MADE: list[tuple[Callable[[], object], str]] = [
    (
        lambda: P.Causal("lower"),
        "Causal: align is 'lower'. Write 'upper_left' or 'lower_right'.",
    ),
    (
        lambda: P.SlidingWindow(0),
        "SlidingWindow of zero tokens left and right. Count the other tokens that a query sees, "
        "as in SlidingWindow(127, 0).",
    ),
    (lambda: P.SlidingWindow(-1), "SlidingWindow: left is -1. Write 0 or more."),
    (lambda: P.SlidingWindow(3, -2), "SlidingWindow: right is -2. Write 0 or more."),
    (
        lambda: P.SlidingWindow(1.5),
        "SlidingWindow: left must be a whole number, not 1.5. Write 0 or more.",
    ),
    (
        lambda: P.SlidingWindow(True),
        "SlidingWindow: left must be a whole number, not True. Write 0 or more.",
    ),
    (
        lambda: P.SlidingWindow(1, align="left"),
        "SlidingWindow: align is 'left'. Write 'upper_left' or 'lower_right'.",
    ),
    (lambda: P.Dilated(0, 2), "Dilated: window is 0. Write 1 or more."),
    (lambda: P.Dilated(2, 0), "Dilated: dilation is 0. Write 1 or more."),
    (lambda: P.Dilated(2, 2, 1), "Dilated: causal is 1. Write True or False."),
    (lambda: P.Strided(0), "Strided: stride is 0. Write 1 or more."),
    (lambda: P.Strided(4, 0), "Strided: local is 0. Write 1 or more."),
    (lambda: P.Fixed(4, 5), "Fixed: summary is 5 tokens of a block of 4. Write 4 or fewer."),
    (lambda: P.Fixed(4, 0), "Fixed: summary is 0. Write 1 or more."),
    (lambda: P.BlockLocal(0), "BlockLocal: size is 0. Write 1 or more."),
    (
        lambda: P.BlockLocal(4, (0, 2)),
        "BlockLocal: (0, 2) is no permutation. Write every number from 0 to 1 once.",
    ),
    (
        lambda: P.BlockSparse((1, 0), 4),
        "BlockSparse: layout has the sizes [2]. Write [query blocks, key blocks], with [heads] or "
        "[batch, heads] before it.",
    ),
    (
        lambda: P.BlockSparse(((1, 0), (1,)), 4),
        "BlockSparse: layout has rows of different lengths. Give every row the same length.",
    ),
    (
        lambda: P.BlockSparse(torch.rand(2, 2), 4),
        "BlockSparse: layout is a tensor of torch.float32. Pass integers or bools.",
    ),
    (lambda: P.BlockSparse(((1,),), (4, 0)), "BlockSparse: block is 0. Write 1 or more."),
    (
        lambda: P.BlockSparse(((1,),), (4, 4, 4)),
        "BlockSparse: block is (4, 4, 4). Write one size or a pair of them.",
    ),
    (lambda: P.Global(0), "Global: the number of global tokens is 0. Write 1 or more."),
    (lambda: P.Global((3, -1)), "Global: a global token is -1. Write 0 or more."),
    (lambda: P.Global(()), "Global of no tokens. Name one token or more."),
    (
        lambda: P.Global("all"),
        "Global: the number of global tokens must be a whole number, not 'all'. Write 1 or more.",
    ),
    (lambda: P.Longformer(1), "Longformer: window is 1. Write 2 or more."),
    (lambda: P.Random(4, 0, 0), "Random: random is 0. Write 1 or more."),
    (
        lambda: P.Random(4, 1, None),
        "Random: seed must be a whole number, not None. Write 0 or more.",
    ),
    (
        lambda: P.BigBird(64, 3, 2, 4),
        "BigBird: window is 4 blocks, but the query's own is in the middle. Write an odd number, "
        "such as 5.",
    ),
    (lambda: P.BigBird(64, -1, 2, 3), "BigBird: random is -1. Write 0 or more."),
    (
        lambda: P.Axial((8,)),
        "Axial: a grid of 1 axes, (8,). Write 2 or 3 sizes, such as (64, 64).",
    ),
    (lambda: P.Axial((8, 0)), "Axial: a size of the grid is 0. Write 1 or more."),
    (
        lambda: P.Axial((8, 8), axes=(2,)),
        "Axial: axes (2,) of a grid of 2 axes. Name some of (0, 1).",
    ),
    (
        lambda: P.Neighborhood((8, 8), 5, 2),
        "Neighborhood: a window of 5 with dilation 2 does not fit axis 0 of 8 cells. "
        "window * dilation can be 8 at most.",
    ),
    (
        lambda: P.Neighborhood((8, 8), (3, 3, 3)),
        "Neighborhood: window has 3 entries for 2 axes. Write one for all or one each.",
    ),
    (
        lambda: P.Neighborhood((8,), 3, causal="yes"),
        "Neighborhood: causal is 'yes'. Write True or False.",
    ),
    (
        lambda: P.SlidingTile((8, 9), 2, 3),
        "SlidingTile: tiles of 2 cells do not divide axis 1 of 9 cells. Write a divisor of 9.",
    ),
    (
        lambda: P.SlidingTile((16,), 2, 4),
        "SlidingTile: a window of 4 tiles along axis 0 of 8 tiles. Write an odd number of tiles "
        "below 8, or all 8.",
    ),
    (
        lambda: P.SlidingTile((8,), 2, 3, order="blocks"),
        "SlidingTile: order is 'blocks'. Write 'rows' or 'tiles'.",
    ),
    (lambda: P.PrefixLM(-1), "PrefixLM: prefix is -1. Write 0 or more."),
    (
        lambda: P.PrefixLM(torch.zeros(2, 3, dtype=torch.int64)),
        "PrefixLM: prefix has the sizes [2, 3]. Write an int, or one length for each batch entry.",
    ),
    (
        lambda: P.Documents(),
        "Documents needs ids or cu_seqlens, and not both. Write Documents(ids) or "
        "Documents(cu_seqlens=(0, 3, 8)).",
    ),
    (
        lambda: P.Documents(cu_seqlens=(1, 5)),
        "Documents: cu_seqlens is (1, 5). Start at 0 and write growing numbers, such as (0, 3, 8).",
    ),
    (
        lambda: P.Documents(cu_seqlens=(0, 5, 3)),
        "Documents: cu_seqlens is (0, 5, 3). Start at 0 and write growing numbers, such as "
        "(0, 3, 8).",
    ),
    (
        lambda: P.Documents(torch.zeros(2, 2, 2, dtype=torch.int64)),
        "Documents: ids has the sizes [2, 2, 2]. Write [tokens] or [batch, tokens].",
    ),
    (
        lambda: P.Documents(("a", "b")),
        "Documents: ids holds 'a'. Pass a tensor or a tuple of integers.",
    ),
    (
        lambda: P.Padding(torch.ones(2, 5, dtype=torch.int64)),
        "Padding: lengths has the sizes [2, 5]. Write one length for each batch entry, as in "
        "Padding(mask.sum(-1)).",
    ),
    (lambda: P.Padding((1,), side="top"), "Padding: side is 'top'. Write 'right' or 'left'."),
    (lambda: P.heads([]), "heads(()) needs a list of patterns. Write one for each head."),
    (
        lambda: P.heads(P.Causal()),  # type: ignore[arg-type]
        "heads(Causal()) needs a list of patterns. Write one for each head.",
    ),
    (
        lambda: P.heads([P.Causal(), 3]),  # type: ignore[list-item]
        "heads: 3 is no pattern. Wrap a function of (b, h, q, kv) in Predicate(...).",
    ),
    (lambda: P.heads([P.Causal()], per=0), "heads: per is 0. Write 1 or more."),
    (
        lambda: P.presets.blockbert(512, 4),
        "blockbert of 4 blocks. Write 2 or 3, as in the paper.",
    ),
    (lambda: P.BlockDiffusion(0), "BlockDiffusion: block is 0. Write 1 or more."),
    (
        lambda: P.PrefixTree((2, 2), (0, 1, 2)),
        "PrefixTree: tin has the sizes [3], but tout has [2]. Write both for the same tokens.",
    ),
    (
        lambda: P.PrefixTree.of_parents((1, 0)),
        "PrefixTree: token 0 is below itself. Every token must lead to a root, -1.",
    ),
    (
        lambda: P.PrefixTree.of_parents((-1, 3)),
        "PrefixTree: the parent of 1 is 3. Write -1 for none, or below 2.",
    ),
    (
        lambda: P.PrefixTree.of_parents(()),
        "PrefixTree: parents has the sizes [0]. Write [tokens] or [batch, tokens].",
    ),
    (
        lambda: P.PrefixTree.of_segments((3, 1), (-1,)),
        "PrefixTree: 2 lengths and 1 parents of segments. Write one of each for every segment.",
    ),
    (
        lambda: P.PrefixTree.of_segments((3, 0), (-1, 0)),
        "PrefixTree: a segment length is 0. Write 1 or more.",
    ),
    (
        lambda: P.DraftTree(((1, 0),)),
        "DraftTree: sees has the sizes [1, 2]. Write [drafts, drafts] or [batch, drafts, drafts].",
    ),
    (lambda: P.DraftTree(((1,),), -1), "DraftTree: context is -1. Write 0 or more."),
    (
        lambda: P.DraftTree.of_parents((0,)),
        "DraftTree: the parent of 0 is 0. Write -1 for none, or below 1.",
    ),
    (
        lambda: P.Packed((0, 3), 4),  # type: ignore[arg-type]
        "Packed: 4 is no pattern. Write one, as in Packed(c, Causal()).",
    ),
    (
        lambda: P.Packed((0, 3), P.Causal() & P.Random(2, 1, 0)),
        "Packed: Random(2, 1, 0) cannot be counted anew in each sequence. Combine it, as in "
        "Packed(cu_seqlens, All()) & Random(2, 1, 0).",
    ),
    (
        lambda: P.Packed((0, 3), P.Causal(), (0, 1, 2)),
        "Packed: 1 sequences of keys and 2 of queries. Write as many of both.",
    ),
    (
        lambda: P.presets.streaming_llm(1),
        "streaming_llm: recent is 1. Write 2 or more.",
    ),
    (lambda: P.Predicate(3), "Predicate(3) is no function. Pass one of (b, h, q, kv)."),
]


@pytest.mark.parametrize("make, message", MADE, ids=lambda case: "")
def test_what_cannot_be_made(make: Callable[[], object], message: str) -> None:
    with pytest.raises(BadPattern) as caught:
        make()
    assert str(caught.value) == f"sparse_compile: {message}"


#: Pattern, sizes (n_q, n_kv, batch, heads), message.
MISFITS: list[tuple[P.Pattern, tuple[int, int, int, int], str]] = [
    (
        P.Global((0, 9)),
        (12, 9, 1, 1),
        "Global: token 9 is global, but there are 9 keys. Name tokens below 9.",
    ),
    (
        P.Global(10),
        (12, 9, 1, 1),
        "Global: token 9 is global, but there are 9 keys. Name tokens below 9.",
    ),
    (
        P.Longformer(4, (20,)),
        (9, 9, 1, 1),
        "Global: token 20 is global, but there are 9 keys. Name tokens below 9.",
    ),
    (
        P.Random(4, 3, 0),
        (8, 8, 1, 1),
        "Random: 3 random blocks of the 2 that 8 keys make. Write random=2 or fewer, or smaller "
        "blocks.",
    ),
    (
        P.BigBird(4, 3, 2, 3),
        (24, 24, 1, 1),
        "BigBird: 3 random blocks, but of the 6 blocks that 24 keys make only 2 are neither global "
        "nor in the window of block 2. Write random=2 or fewer, or smaller blocks.",
    ),
    (
        P.BigBird(4, 0, 3, 1),
        (8, 8, 1, 1),
        "BigBird: 3 global blocks of the 2 that 8 keys make. Write global_=2 or fewer, or smaller "
        "blocks.",
    ),
    (
        P.BlockLocal(4, (1, 0)),
        (8, 12, 1, 1),
        "BlockLocal: a permutation of 2 blocks of 4 tokens does not fit 12 keys. 12 keys are 3 "
        "such blocks.",
    ),
    (
        P.BlockSparse(((1, 0), (0, 1)), 4),
        (8, 9, 1, 1),
        "BlockSparse: a layout of [2, 2] in blocks of 4 does not fit 8 queries and 9 keys (batch "
        "1, 1 heads). Write a layout of [2, 3].",
    ),
    (
        P.BlockSparse((((1,),), ((1,),)), 4),
        (4, 4, 1, 3),
        "BlockSparse: a layout of [2, 1, 1] in blocks of 4 does not fit 4 queries and 4 keys "
        "(batch 1, 3 heads). Write a layout of [3, 1, 1].",
    ),
    (
        P.Axial((4, 5)),
        (21, 21, 1, 1),
        "Axial: a grid of 4 x 5 has 20 cells, but there are 21 queries and 21 keys. Write a shape "
        "whose product is the number of tokens.",
    ),
    (
        P.Neighborhood((4, 5), 3),
        (20, 21, 1, 1),
        "Neighborhood: a grid of 4 x 5 has 20 cells, but there are 20 queries and 21 keys. Write a "
        "shape whose product is the number of tokens.",
    ),
    (
        P.SlidingTile((4,), 2, 1),
        (1, 4, 1, 1),
        "SlidingTile: a grid of 4 has 4 cells, but there are 1 queries and 4 keys. Write a shape "
        "whose product is the number of tokens.",
    ),
    (
        P.PrefixLM((1, 2)),
        (4, 4, 3, 1),
        "PrefixLM: 2 prefix lengths for a batch of 3. Write 3 lengths, or an int for all.",
    ),
    (P.Padding((1, 2)), (4, 4, 1, 1), "Padding: 2 lengths for a batch of 1. Write 1 lengths."),
    (
        P.Padding((5,)),
        (4, 4, 1, 1),
        "Padding: a length of 5, but there are 4 keys. Write lengths from 0 to 4.",
    ),
    (
        P.Documents((0, 0, 1)),
        (3, 4, 1, 1),
        "Documents: 3 queries and 4 keys cannot have the same documents. Write q_ids= for the "
        "documents of the queries.",
    ),
    (
        P.Documents((0, 0, 1)),
        (4, 4, 1, 1),
        "Documents: ids names the documents of 3 tokens, but there are 4 keys. Write 4 ids.",
    ),
    (
        P.Documents((0, 0, 1), q_ids=(0,)),
        (2, 3, 1, 1),
        "Documents: q_ids names the documents of 1 tokens, but there are 2 queries. Write 2 ids.",
    ),
    (
        P.Documents(((0, 0), (0, 1))),
        (2, 2, 3, 1),
        "Documents: ids has 2 rows for a batch of 3. Write 3 rows, or one.",
    ),
    (
        P.Documents(cu_seqlens=torch.tensor([0, 3, 5])),
        (6, 6, 1, 1),
        "Documents: cu_seqlens ends at 5, but there are 6 keys. The last entry is the number of "
        "tokens of all documents.",
    ),
    (
        P.heads([P.Causal(), P.All()]),
        (4, 4, 1, 8),
        "heads: 2 patterns with per=1 are for 2 heads, but there are 8. Write per=4 to share each "
        "among 4 heads.",
    ),
    (
        P.heads([P.Causal(), P.All(), P.All()]),
        (4, 4, 1, 8),
        "heads: 3 patterns with per=1 are for 3 heads, but there are 8. Write 8 patterns, one for "
        "each head.",
    ),
    (
        P.BlockDiffusion(4),
        (9, 9, 1, 1),
        "BlockDiffusion: 9 queries and 9 keys are no two halves, noisy and clean. Put the clean "
        "sequence behind the noisy one, of as many tokens.",
    ),
    (
        P.PrefixTree((2, 2)),
        (3, 3, 1, 1),
        "PrefixTree: a tree of 2 tokens does not fit 3 queries and 3 keys. Write a tree of 3 "
        "tokens, and as many queries or fewer.",
    ),
    (
        P.PrefixTree(((2, 2), (1, 2))),
        (2, 2, 3, 1),
        "PrefixTree: 2 trees for a batch of 3. Write 3 trees, or one.",
    ),
    (
        P.DraftTree(((1, 0), (1, 1))),
        (3, 9, 1, 1),
        "DraftTree: a tree of 2 drafts does not fit 3 queries and 9 keys. Write a tree of 3 "
        "drafts, and keys for them and for the context.",
    ),
    (
        P.DraftTree(((1, 0), (1, 1)), 4),
        (2, 5, 1, 1),
        "DraftTree: a context of 4 keys and 2 drafts, but there are 5 keys. Write a context of 3 "
        "or less.",
    ),
    (
        P.DraftTree(((1, 0), (1, 1)), (4, 3)),
        (2, 9, 3, 1),
        "DraftTree: 2 contexts for a batch of 3. Write 3 contexts, or one.",
    ),
    (
        P.Packed((0, 3), P.Causal()),
        (4, 4, 1, 1),
        "Packed: the sequences end at 3, but there are 4 queries. The last entry is the number of "
        "tokens of all sequences; write q_cu_seqlens= if the queries are others than the keys.",
    ),
    (
        P.Packed((0, 3, 5), P.Global(3)),
        (5, 5, 1, 1),
        "Global: token 2 is global, but there are 2 keys. Name tokens below 2.",
    ),
    (
        P.Predicate(lambda b, h, q, kv: torch.arange(5)[kv] > 2, name="short"),
        (4, 6, 1, 1),
        "Predicate(short) reads a tensor of [5] at kv, which goes up to 5. Pass a tensor of that "
        "size.",
    ),
]


@pytest.mark.parametrize("pattern, sizes, message", MISFITS, ids=lambda case: "")
def test_what_does_not_fit(
    pattern: P.Pattern, sizes: tuple[int, int, int, int], message: str
) -> None:
    wraps = [pattern, ~pattern, P.Causal() | pattern, pattern & P.All()]
    for wrapped in [*wraps, P.heads([pattern] * sizes[-1])]:
        if isinstance(pattern, P.Heads) and isinstance(wrapped, P.Heads):
            continue
        with pytest.raises(BadPattern) as caught:
            wrapped.dense(*sizes)
        assert str(caught.value) == f"sparse_compile: {message}"


def test_messages_are_one_line() -> None:
    assert all("\n" not in message for _, message in MADE)
    assert all("\n" not in message for *_, message in MISFITS)

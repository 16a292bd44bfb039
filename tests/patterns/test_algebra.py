"""Patterns are values: they print as what makes them, compare by it, and combine."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import int32, tensor

from sparse_compile import patterns as P
from sparse_compile.errors import PatternMisuse

#: What a repr is evaluated in.
NAMES = {**vars(P), "tensor": tensor, "int32": int32}

PRINTED = [
    (P.All(), "All()"),
    (P.Causal(), "Causal()"),
    (P.Causal(align="lower_right"), "Causal(align='lower_right')"),
    (P.SlidingWindow(128), "SlidingWindow(128)"),
    (P.SlidingWindow(128, 128), "SlidingWindow(128)"),
    (P.SlidingWindow(128, 0), "SlidingWindow(128, right=0)"),
    (P.Dilated(3, 2), "Dilated(3, 2)"),
    (P.Dilated(3, 2, causal=True), "Dilated(3, 2, causal=True)"),
    (P.Strided(128), "Strided(128)"),
    (P.Strided(128, 32, causal=False), "Strided(128, local=32, causal=False)"),
    (P.Fixed(128, 8), "Fixed(128, 8)"),
    (P.BlockLocal(64), "BlockLocal(64)"),
    (P.BlockLocal(64, [1, 0]), "BlockLocal(64, permutation=(1, 0))"),
    (P.BlockSparse([[True, False]], 64), "BlockSparse(((1, 0),), 64)"),
    (P.BlockSparse(((1, 0),), (32, 64)), "BlockSparse(((1, 0),), (32, 64))"),
    (P.Global(64), "Global(64)"),
    (P.Global([99, 0, 17, 0]), "Global((0, 17, 99))"),
    (P.Global(range(3), rows=False), "Global((0, 1, 2), rows=False)"),
    (P.Random(64, 3, 0), "Random(64, 3, 0)"),
    (P.Random(64, 3, 0, per_head=True), "Random(64, 3, 0, per_head=True)"),
    (P.BigBird(64, 3, 2, 3), "BigBird(64, 3, 2, 3)"),
    (P.BigBird(block=64, random=3, global_=2, window=3, seed=7), "BigBird(64, 3, 2, 3, seed=7)"),
    (P.Longformer(512), "Longformer(512)"),
    (P.Longformer(512, (0, 5)), "Longformer(512, global_=(0, 5))"),
    (P.Axial([64, 64]), "Axial((64, 64))"),
    (P.Axial((8, 8, 8), axes=(2, 0)), "Axial((8, 8, 8), axes=(0, 2))"),
    (P.Neighborhood((8, 8), 3), "Neighborhood((8, 8), 3)"),
    (P.Neighborhood((8, 8), (3, 3)), "Neighborhood((8, 8), 3)"),
    (
        P.Neighborhood((8, 8), (3, 5), causal=(True, False)),
        "Neighborhood((8, 8), (3, 5), causal=(True, False))",
    ),
    (P.SlidingTile((8, 8), 2, (3, 1)), "SlidingTile((8, 8), 2, (3, 1))"),
    (P.PrefixLM(7), "PrefixLM(7)"),
    (P.PrefixLM((7, 8)), "PrefixLM((7, 8))"),
    (P.Documents((0, 0, 1)), "Documents(ids=(0, 0, 1))"),
    (P.Documents(tensor([0, 0, 1])), "Documents(ids=tensor([0, 0, 1]))"),
    (
        P.Documents(cu_seqlens=tensor([0, 5], dtype=int32)),
        "Documents(cu_seqlens=tensor([0, 5], dtype=int32))",
    ),
    (P.Padding(tensor([3, 4]), side="left"), "Padding(tensor([3, 4]), side='left')"),
    (P.BlockDiffusion(16), "BlockDiffusion(16)"),
    (P.PrefixTree((3, 2, 3)), "PrefixTree((3, 2, 3))"),
    (P.PrefixTree.of_segments((1, 1), (-1, 0)), "PrefixTree((2, 2))"),
    (P.PrefixTree.of_parents((-1, 0, 0, 1)), "PrefixTree((4, 3, 4, 3), tin=(0, 1, 3, 2))"),
    (P.PrefixTree(tensor([2, 2]), align="lower_right"), None),
    (P.DraftTree(((True, False), (1, 1)), (3, 4)), "DraftTree(((1, 0), (1, 1)), context=(3, 4))"),
    (P.DraftTree.of_parents(tensor([-1, 0])), "DraftTree(tensor([[True, False], [True, True]]))"),
    (P.Packed([0, 3], P.Causal()), "Packed((0, 3), Causal())"),
    (P.Packed(tensor([0, 3]), P.Causal() & P.All(), (0, 1)), None),
    (P.presets.llama4_chunked(), "(BlockLocal(8192) & Causal())"),
    (P.presets.streaming_llm(), None),
    (P.heads([P.Causal(), P.All()]), "heads([Causal(), All()])"),
    (P.Heads((P.Causal(), P.All()), 4), "heads([Causal(), All()], per=4)"),
    (P.Causal() & P.SlidingWindow(128), "(Causal() & SlidingWindow(128))"),
    (P.Causal() & P.All() & P.Global(1), "(Causal() & All() & Global(1))"),
    (P.Causal() & (P.All() & P.Global(1)), "(Causal() & All() & Global(1))"),
    (P.Causal() & P.All() | P.Global(1), "((Causal() & All()) | Global(1))"),
    (~(P.Causal() | P.All()) & ~P.Global(1), "(~(Causal() | All()) & ~Global(1))"),
    (P.Not(P.Not(P.All())), "Not(~All())"),
    (P.presets.blockbert(512, 2) & P.All(), None),
]


@pytest.mark.parametrize("pattern, text", PRINTED, ids=lambda case: "")
def test_a_pattern_prints_as_what_makes_it(pattern: P.Pattern, text: str | None) -> None:
    assert text is None or repr(pattern) == text
    again = eval(repr(pattern), NAMES)
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert copy.deepcopy(pattern) == pattern
    assert pickle.loads(pickle.dumps(pattern)) == pattern


def test_different_patterns_are_different() -> None:
    different: list[P.Pattern] = []
    for pattern, _ in PRINTED:
        if all(repr(pattern) != repr(other) for other in different):
            different.append(pattern)
    for i, one in enumerate(different):
        for other in different[i + 1 :]:
            assert one != other
    assert P.Causal() != "Causal()"
    assert P.Documents((0, 1)) != "Documents"


def test_a_long_tensor_prints_as_its_shape() -> None:
    pattern = P.Documents(torch.zeros(2, 4096, dtype=torch.int32))
    assert repr(pattern) == "Documents(ids=<int32 tensor [2, 4096]>)"


def test_tensors_compare_by_content() -> None:
    ids = tensor([0, 0, 1])
    assert P.Documents(ids) == P.Documents(ids.clone())
    assert P.Documents(ids) != P.Documents(ids + 1)
    assert P.Documents(ids) != P.Documents(ids.int())
    assert P.Documents(ids) != P.Documents((0, 0, 1))
    assert len({P.Documents(ids), P.Documents(ids.clone()), P.Documents(ids + 1)}) == 2


def test_twice_not_is_nothing() -> None:
    assert ~~P.Causal() == P.Causal()


def test_patterns_do_not_change() -> None:
    for pattern, _ in PRINTED:
        with pytest.raises(AttributeError):
            pattern.align = "elsewhere"  # type: ignore[attr-defined]


def test_python_operators_on_truth_are_errors() -> None:
    for misuse in (
        lambda: P.Causal() and P.All(),
        lambda: P.Causal() or P.All(),
        lambda: not P.Causal(),
        lambda: bool(P.Causal()),
    ):
        with pytest.raises(PatternMisuse) as caught:
            misuse()
        assert "neither true nor false" in str(caught.value)
        assert "Write `&`, `|` and `~`, as in Causal() & other." in str(caught.value)


def test_only_patterns_combine() -> None:
    for misuse in (lambda: P.Causal() & 3, lambda: P.Causal() | (lambda b, h, q, kv: True)):
        with pytest.raises(PatternMisuse, match="the right side is no pattern"):
            misuse()
    with pytest.raises(PatternMisuse, match="And of 3, which is no pattern"):
        P.And(P.Causal(), 3)  # type: ignore[arg-type]
    with pytest.raises(PatternMisuse, match="Not of 3, which is no pattern"):
        P.Not(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"And of 1 patterns\. Write And\(one, other\)"):
        P.And(P.Causal())


LENGTHS = 6, 9
LEAVES = [
    P.All(),
    P.Causal(),
    P.Causal("lower_right"),
    P.SlidingWindow(2, 1),
    P.Dilated(1, 3),
    P.Strided(3),
    P.Fixed(4, 1, causal=False),
    P.BlockLocal(4),
    P.Global((0, 4)),
    P.Global(range(0, 9, 2)) & P.Causal(),
    P.Random(2, 2, 0),
    P.BigBird(2, 1, 1, 1),
    P.Padding((5, 9)),
    P.Padding(tensor([3, 4]), side="left"),
    P.PrefixLM(tensor([4, 1])),
    P.Documents((0, 0, 0, 1, 1, 1, 1, 2, 2), q_ids=((0, 0, 1, 1, 2, 2), (2, 2, 2, 1, 1, 1))),
    P.BlockSparse(((1, 0, 1), (0, 1, 1)), 3),
    P.PrefixTree.of_parents((-1, 0, 0, 1, 2, 4, -1, 6, 1), align="lower_right"),
    P.DraftTree.of_parents((-1, 0, 0, 2, -1, 4), (3, 1)),
    P.Packed((0, 4, 9), P.Causal("lower_right"), tensor([0, 2, 6])),
    P.heads([P.Causal(), P.All(), P.Global(2)]),
    P.Predicate(lambda b, h, q, kv: (q + kv + h) % 3 == b),
]


def compositions() -> st.SearchStrategy[P.Pattern]:
    return st.recursive(
        st.sampled_from(LEAVES),
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a: ~a, inner),
        ),
        max_leaves=5,
    )


def combined(pattern: P.Pattern) -> torch.Tensor:
    """The mask of a composition from the masks of its leaves."""
    if isinstance(pattern, P.And):
        return torch.stack([combined(part) for part in pattern.parts]).all(0)
    if isinstance(pattern, P.Or):
        return torch.stack([combined(part) for part in pattern.parts]).any(0)
    if isinstance(pattern, P.Not):
        return ~combined(pattern.part)
    return pattern.dense(*LENGTHS, batch=2, heads=3).expand(2, 3, *LENGTHS)


@settings(max_examples=120, deadline=None)
@given(compositions())
def test_compositions_are_boolean_combinations(pattern: P.Pattern) -> None:
    mask = pattern.dense(*LENGTHS, batch=2, heads=3).expand(2, 3, *LENGTHS)
    assert mask.equal(combined(pattern))


def test_patterns_need_neither_torch_nor_triton() -> None:
    program = (
        "import sys\n"
        "from sparse_compile import patterns as P\n"
        "made = (P.Causal() & P.Documents((0, 0, 1)) | ~P.Neighborhood((4, 4), 3)\n"
        "        | P.BigBird(64, 3, 2, 3) | P.Padding([1, 2]) | P.BlockDiffusion(4)\n"
        "        | P.Packed((0, 3), P.Causal()) | P.DraftTree.of_parents((-1, 0))\n"
        "        | P.heads([P.All(), P.Strided(8)])\n"
        "        | P.Predicate(lambda b, h, q, kv: (q - kv).abs() < 3))\n"
        "print(made.bound().expr, made, hash(made), made == made)\n"
        "heavy = {'torch', 'triton', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

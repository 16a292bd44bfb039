"""A program for each seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.fuzz.idiom import Numbers, Piece
from benchmarks.fuzz.masks import HEADS, JOINED, MASKS, NARROWING, PLACES, TENSORS, TOKENS
from benchmarks.fuzz.program import MEMORY, Added, Joined, Program, Sizes
from benchmarks.fuzz.scores import (
    ADDED,
    BIASES,
    BROADCASTING,
    CURVES,
    HIDING,
    IN_PLACE,
    LATE,
    MERGED,
    MULTIPLYING,
    PRODUCTS,
    REPEATED,
    REPLACING,
    SCALES,
    SDPA,
    SOFTMAX,
    STEPS,
    WEIGHTS,
)

#: How much each is worth: sums are 1.
_DTYPES = {"float32": 0.8, "bfloat16": 0.12, "float16": 0.08}
_RANKS = {4: 0.86, 3: 0.06, 2: 0.03, 5: 0.05}


class Draw:
    """Choices that follow from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(f"fuzz {seed}")

    def chance(self, p: float) -> bool:
        return self._random.random() < p

    def one(self, of: Sequence[Any]) -> Any:
        return self._random.choice(of)

    def weighted(self, of: Mapping[Any, float]) -> Any:
        return self._random.choices(list(of), list(of.values()))[0]

    def between(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def key(self, table: Mapping[str, Any]) -> str:
        """A key of a table of idioms, by their weights."""
        chosen: str = self.weighted({name: getattr(x, "weight", 1) for name, x in table.items()})
        return chosen

    def piece(self, table: Mapping[str, Any]) -> Piece:
        between = self.between
        return Piece(
            self.key(table), Numbers(between(1, 9), between(2, 5), between(1, 4), between(3, 17))
        )


def draw(seed: int) -> Program:
    """The program of a seed."""
    d = Draw(seed)
    sizes = _sizes(d)
    program = Program(
        sizes=sizes,
        dtype=d.weighted(_DTYPES),
        grad=d.chance(0.5),
        memory="contiguous" if sizes.rank == 2 or d.chance(0.5) else d.one(list(MEMORY)),
        upper=d.chance(0.2),
    )
    sdpa = d.chance(0.3)
    program = _sdpa(d, program) if sdpa else _written(d, program)
    program = replace(program, masks=_masks(d, program))
    program = _hidden(d, program, sdpa)
    s = program.sizes
    moved = program.product in ("einsum, tokens first", "module")
    tokens_first = "joined" in program.output or moved
    same = s.D == s.E and s.rank == 4 and not tokens_first
    dynamic = s.rank == 4 and d.chance(0.05) and min(s.B, s.H, s.G, s.NQ) > 1
    return replace(program, layers=2 if same and d.chance(0.1) else 1, dynamic=dynamic)


def _sizes(d: Draw) -> Sizes:
    rank, heads = d.weighted(_RANKS), d.one([1, 2, 3, 4, 4, 6])
    fewer = heads if d.chance(0.65) else d.one([g for g in (1, 2, 3) if heads % g == 0])
    keys = d.between(9, 80)
    queries = keys if d.chance(0.7) else d.between(1, keys)
    if d.chance(0.03):
        queries = d.between(keys, 80)
    dim = d.one([4, 8, 8, 16, 16, 20])
    return Sizes(
        B=1 if rank == 2 else d.between(1, 3),
        H=1 if rank < 4 else heads,
        G=1 if rank < 4 else fewer,
        NQ=queries,
        NK=keys,
        D=dim,
        E=dim if d.chance(0.7) else d.one([4, 8, 24]),
        rank=rank,
    )


def _repeated(d: Draw, program: Program, given: bool) -> Program:
    """With as many heads of keys as a product needs; ``given``: it takes fewer."""
    sizes = program.sizes
    several = program.product in BROADCASTING and sizes.G > 1
    if sizes.G == sizes.H or (given and not several and d.chance(0.6)):
        return program
    if sizes.rank != 4:
        return replace(program, sizes=replace(sizes, G=sizes.H))
    return replace(program, repeated=d.one(list(REPEATED)))


def _sdpa(d: Draw, program: Program) -> Program:
    steps = (Piece("times"),) if d.chance(0.4) else ()
    biases = (Added(d.piece(BIASES)),) if d.chance(0.25) else ()
    program = replace(program, product=d.one(list(SDPA)), steps=steps, biases=biases)
    if program.product != "module":
        return _repeated(d, program, True)
    heads = program.sizes.H
    sizes = replace(program.sizes, G=heads, E=program.sizes.D, rank=4)
    softmax = d.one(["method", "function"])  # which is asked for the weights
    return replace(program, sizes=sizes, steps=(), softmax=softmax, memory="contiguous")


def _written(d: Draw, program: Program) -> Program:
    rank = program.sizes.rank
    product = d.key({name: p for name, p in PRODUCTS.items() if rank in p.ranks})
    of = PRODUCTS[product]
    steps = []
    if d.chance(0.85):
        steps.append(d.piece({name: STEPS[name] for name in ("times", "divided", "in place")}))
    if d.chance(0.4):
        steps.append(d.piece(STEPS))
    if d.chance(0.1):
        steps.append(d.piece(STEPS))
    biases = [Added(d.piece(BIASES), d.one(list(ADDED))) for _ in range(3) if d.chance(0.15)]
    program = replace(
        program,
        product=product,
        scale=d.one(list(SCALES)) if d.chance(0.15) else "",
        steps=tuple(steps),
        biases=tuple(biases),
        softmax=d.one(list(SOFTMAX)),
        sinks=d.chance(0.03 if of.before == MERGED else 0.08),
        output=("joined",) if rank == 4 and d.chance(0.2) else (),
    )
    if _saved(program):
        kept = tuple(step for step in program.steps if "in place" not in step.name)
        added = tuple(replace(bias, how="plus") for bias in program.biases)
        program = replace(program, steps=kept, biases=added)
    return program if of.grouped else _repeated(d, program, product in BROADCASTING)


def _saved(program: Program) -> bool:
    """Whether the backward of a curve reads scores, so that they must not be changed in place."""
    return program.grad and any(step.name in CURVES for step in program.steps)


def _masks(d: Draw, program: Program) -> tuple[Joined, ...]:
    sizes = program.sizes
    kinds = {"places": PLACES, "tokens": TOKENS, "heads": HEADS, "tensors": TENSORS}
    weights = {"places": 0.55, "tokens": 0.35, "heads": 0.05, "tensors": 0.05}
    drawn = []
    for _ in range(d.weighted({0: 0.08, 1: 0.37, 2: 0.4, 3: 0.15})):
        how = "and" if d.chance(0.7) else d.one(list(JOINED))
        drawn.append(Joined(d.piece(kinds[d.weighted(weights)]), how))
    if sizes.NQ > sizes.NK:
        drawn = [mask for mask in drawn if "NK - NQ :" not in MASKS[mask.piece.name].text]
    if len({mask.piece.name for mask in drawn}) < len(drawn):
        drawn = drawn[:1]
    return tuple(drawn)


def _hidden(d: Draw, program: Program, sdpa: bool) -> Program:
    """With a way to hide keys that fits what is done before."""
    fill = d.weighted({"infinity": 0.55, "least": 0.43, "number": 0.02})
    ways = {"masked_fill": 2, "added": 1, "inverted": 1} if sdpa else dict.fromkeys(HIDING, 1.0)
    hiding = d.weighted({name: 0.1 if name == "by index" else p for name, p in ways.items()})
    if hiding in IN_PLACE and _saved(program):
        hiding = "masked_fill"
    if hiding in MULTIPLYING and fill == "infinity":
        fill = "least"
    if hiding not in REPLACING and fill == "number":
        fill = "hundred"
    narrow = all(mask.how in NARROWING for mask in program.masks)
    program = replace(program, hiding=hiding, fill=fill)
    if sdpa:
        bare = not program.masks and not program.biases and program.product != "module"
        return replace(program, causal=bare and d.chance(0.5))
    late = [name for name in LATE if d.chance(0.04)]
    weights = [name for name in WEIGHTS if d.chance(0.02 if name == "masked again" else 0.05)]
    return replace(
        program,
        several=narrow and len(program.masks) > 1 and d.chance(0.12),
        late=tuple(late),
        weights=tuple(weights),
    )

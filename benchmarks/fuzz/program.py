"""Program: a frozen value, one choice a field, whose source can be printed and run."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.fuzz.idiom import Piece
from benchmarks.fuzz.inputs import INPUTS, Input
from benchmarks.fuzz.masks import JOINED, MASKS
from benchmarks.fuzz.scores import (
    ADDED,
    BIASES,
    FILLS,
    HIDING,
    LATE,
    OF_MODULE,
    OUTPUTS,
    PRODUCTS,
    REPEATED,
    SCALES,
    SDPA,
    SOFTMAX,
    STEPS,
    WEIGHTS,
    fitted,
)


@dataclass(frozen=True)
class Sizes:
    """Of q [B, H, NQ, D], k [B, G, NK, D] and v [B, G, NK, E]; rank 5 has an axis of 2 behind B."""

    B: int = 1
    H: int = 1
    G: int = 1
    NQ: int = 16
    NK: int = 16
    D: int = 4
    E: int = 4
    rank: int = 4


@dataclass(frozen=True)
class Joined:
    """A mask, and how it is joined to those before it: a key of :data:`masks.JOINED`."""

    piece: Piece
    how: str = "and"


@dataclass(frozen=True)
class Added:
    """A bias, and how it is added: a key of :data:`scores.ADDED`."""

    piece: Piece
    how: str = "plus"


@dataclass(frozen=True)
class Program:
    """An attention program. Each field is a key of a table, or pieces; defaults are the plainest.

    Attributes:
        sizes: of the tensors.
        dtype: of q, k, v and all that is trained.
        grad: whether gradients are compared, or inference under ``no_grad``.
        dynamic: whether sizes are symbols to the compiler.
        layers: how often it attends, to the same keys.
        memory: how q, k and v lie in memory: a key of :data:`MEMORY`.
        repeated: how keys get as many heads as queries; empty where the product takes fewer.
        product: how scores and outputs are written.
        scale: what is done to q and k, of :data:`scores.SCALES`; empty: nothing.
        steps: what is done to scores, in order.
        biases: what is added to them.
        upper: whether queries are the first of the places of keys, not the last.
        causal: whether SDPA is told ``is_causal``.
        masks: what hides keys.
        several: whether each mask is applied by itself.
        hiding, fill: how hidden keys lose their scores.
        late: what is done to masked scores.
        sinks: whether there is one more column.
        softmax, weights, output: what follows.
    """

    sizes: Sizes = field(default_factory=Sizes)
    dtype: str = "float32"
    grad: bool = False
    dynamic: bool = False
    layers: int = 1
    memory: str = "contiguous"
    repeated: str = ""
    product: str = "operators"
    scale: str = ""
    steps: tuple[Piece, ...] = ()
    biases: tuple[Added, ...] = ()
    upper: bool = False
    causal: bool = False
    masks: tuple[Joined, ...] = ()
    several: bool = False
    hiding: str = "masked_fill"
    fill: str = "infinity"
    late: tuple[str, ...] = ()
    sinks: bool = False
    softmax: str = "method"
    weights: tuple[str, ...] = ()
    output: tuple[str, ...] = ()

    @property
    def layout(self) -> str:
        """The axes of the scores."""
        others = {2: "qk", 3: "bqk", 5: "bwhqk"}
        if self.sizes.rank in others:
            return others[self.sizes.rank]
        if self.product in SDPA:
            return "nqk, whole" if self.product == "module" else "bhqk"
        return PRODUCTS[self.product].layout

    def reads(self) -> tuple[str, ...]:
        """The names of the tensors that it takes besides q, k and v."""
        idioms = [MASKS[mask.piece.name] for mask in self.masks]
        idioms += [STEPS[step.name] for step in self.steps if self.product not in SDPA]
        idioms += [BIASES[bias.piece.name] for bias in self.biases]
        names = [name for idiom in idioms for name in idiom.reads]
        names += ["sinks"] if self.sinks else []
        return tuple(dict.fromkeys([*names, *(OF_MODULE if self.product == "module" else ())]))


_Q, _K, _V = "B, H, NQ, D", "B, G, NK, D", "B, G, NK, E"
#: How q, k and v lie in memory, by what makes one of a shape.
MEMORY = {
    "contiguous": "randn({shape})",
    "tokens first": "randn({tokens_first}).transpose(-3, -2)",
    "every second": "randn({shape}, 2)[..., 0]",
    "transposed": "randn({transposed}).transpose(-2, -1)",
    "a part": "randn({longer})[..., 3:, :]",
    "expanded": "randn({one}).expand({shape})",
}


def source(program: Program) -> str:
    """A script that defines ``program(q, k, v, ...)`` and ``inputs(seed)``, and imports torch."""
    return "\n".join([*_header(program), "", "", *_function(program), "", "", *_inputs(program)])


def _header(program: Program) -> Iterator[str]:
    sizes = vars(program.sizes)
    names = [name for name in sizes if name != "rank"]
    yield from ("import math", "", "import numpy", "import torch")
    yield from ("import torch.nn.functional as F", "")
    yield f"{', '.join(names)} = {', '.join(str(sizes[name]) for name in names)}"
    yield 'INF = float("inf")'


def _indented(lines: Iterator[str] | list[str], by: int = 1) -> Iterator[str]:
    yield from textwrap.indent("\n".join(lines), "    " * by).split("\n")


def _function(program: Program) -> Iterator[str]:
    yield f"def program({', '.join(['q', 'k', 'v', *program.reads()])}):"
    yield from _indented([*_sizes(program), *_places(program), *_mask(program)])
    body = list(_attention(program))
    if program.layers == 1:
        yield from _indented([*body, "return out"])
        return
    yield from _indented(["", "def attend(q, k, v):"])
    yield from _indented([*body, "return out"], 2)
    call = "attend(q, k, v)"
    for _ in range(program.layers - 1):
        # A query of NaN makes NaN of the gradient of keys that are hidden from it, for eager.
        call = f"attend({call}.nan_to_num(), k, v)"
    yield from _indented(["", f"return {call}"])


def _sizes(program: Program) -> Iterator[str]:
    if program.dynamic:
        yield "B, H, NQ, D = q.shape"
        yield "G, NK, E = k.shape[1], k.shape[2], v.shape[3]"


def _places(program: Program) -> Iterator[str]:
    idioms = [MASKS[mask.piece.name] for mask in program.masks]
    idioms += [BIASES[bias.piece.name] for bias in program.biases]
    if idioms:
        offset = "" if program.upper or program.sizes.NQ == program.sizes.NK else " + NK - NQ"
        yield f"i, j = torch.arange(NQ)[:, None]{offset}, torch.arange(NK)"


def _mask(program: Program) -> Iterator[str]:
    """Statements that make ``keep``, or ``keep0``, ``keep1``... where each is applied by itself."""
    for number, mask in enumerate(program.masks):
        lines, value = MASKS[mask.piece.name].lines(mask.piece.numbers)
        yield from lines
        if program.several:
            yield f"keep{number} = {value}"
        else:
            yield JOINED[mask.how].format(m=value) if number else f"keep = {value}"


def _kept(program: Program) -> list[str]:
    """What is kept by each mask that is applied by itself, in the axes of the scores."""
    axes = [MASKS[mask.piece.name].axes for mask in program.masks]
    if program.several:
        return [fitted(f"keep{n}", one, program.layout) for n, one in enumerate(axes)]
    several = "".join(sorted(set("".join(axes)))) if set(axes) - {"qk"} else "qk"
    return [fitted("keep", several, program.layout)] if axes else []


def _attention(program: Program) -> Iterator[str]:
    if program.repeated:
        yield REPEATED[program.repeated]
    if program.scale:
        yield SCALES[program.scale]
    if program.product in SDPA:
        yield from _sdpa(program)
    else:
        product = PRODUCTS[program.product]
        yield from product.before
        yield f"s = {product.scores}"
        yield from _scored(program)
        yield from _weighted(program)
        yield f"out = {product.out}"
    yield from (OUTPUTS[name] for name in program.output)


def _sdpa(program: Program) -> Iterator[str]:
    """Masks and biases go by its argument."""
    terms = []
    for number, bias in enumerate(program.biases):
        idiom = BIASES[bias.piece.name]
        lines, value = idiom.lines(bias.piece.numbers)
        yield from (*lines, f"bias{number} = {value}")
        terms.append(fitted(f"bias{number}", idiom.axes, program.layout))
    fill = FILLS[program.fill]
    for kept in _kept(program):
        if not terms and program.hiding == "masked_fill":
            terms.append(kept)
        elif program.hiding == "inverted":
            terms.append(f"(1.0 - ({kept}).to(q.dtype)) * torch.finfo(q.dtype).min")
        else:
            terms.append(f"torch.where({kept}, 0.0, {fill})")
    floating = program.biases or program.hiding != "masked_fill"
    joined = " + ".join(terms)
    if terms:
        hidden = "~" if program.product == "module" else ""  # whose masks say what is hidden
        yield f"mask = ({joined}).to(q.dtype)" if floating else f"mask = {hidden}({joined})"
    mask = ", attn_mask=mask" if terms else ", is_causal=True" if program.causal else ""
    scaled = any(step.name in ("times", "in place") for step in program.steps)
    gqa = program.sizes.G != program.sizes.H and not program.repeated
    given = {"mask": mask, "scale": ", scale=0.25" * scaled, "gqa": ", enable_gqa=True" * gqa}
    given["weights"] = str(program.softmax == "function")
    yield f"out = {SDPA[program.product].format(**given)}"


def _scored(program: Program) -> Iterator[str]:
    for step in program.steps:
        idiom = STEPS[step.name]
        named = idiom.reads[0] if idiom.reads else ""
        x = fitted(named, idiom.axes, program.layout)
        before, last = idiom.lines(step.numbers, x=x)
        yield from (*before, last)
    for bias in program.biases:
        idiom = BIASES[bias.piece.name]
        before, value = idiom.lines(bias.piece.numbers)
        yield from before
        value = value if value.isidentifier() else f"({value})"
        yield ADDED[bias.how].format(x=fitted(value, idiom.axes, program.layout))
    for kept in _kept(program):
        yield HIDING[program.hiding].format(m=kept, fill=FILLS[program.fill])
    yield from (LATE[name] for name in program.late)


def _weighted(program: Program) -> Iterator[str]:
    if program.sinks:
        column = fitted("sinks.view(1, H, 1, 1)", "h", program.layout)
        yield f"s = torch.cat([s, {column}.expand(*s.shape[:-1], 1)], dim=-1)"
    yield SOFTMAX[program.softmax]
    if program.sinks:
        yield "w = w[..., :-1]"
    kept = _kept(program)
    for name in program.weights:
        if kept or "{m}" not in WEIGHTS[name]:
            yield WEIGHTS[name].format(m=kept[0] if kept else "")
    if program.dtype != "float32":
        yield "w = w.to(v.dtype)"


def _inputs(program: Program) -> Iterator[str]:
    """The function that draws the inputs, by name."""
    yield "def inputs(seed):"
    generator = ["g = torch.Generator().manual_seed(seed)", "", *_draws(program), ""]
    made = [f'"{name}": {text},' for name, text in _operands(program)]
    for name in program.reads():
        one = INPUTS[name]
        made.append(f'"{name}": {_leaf(one)},')
    yield from _indented([*generator, "return {"])
    yield from _indented(made, 2)
    yield "    }"


def _leaf(one: Input) -> str:
    return f"({one.text}).requires_grad_()" if one.trained else one.text


def _draws(program: Program) -> Iterator[str]:
    reads = " ".join(INPUTS[name].text for name in program.reads())
    dtype = f", dtype=torch.{program.dtype}"
    yield "def randn(*shape):"
    yield f"    return torch.randn(shape, generator=g{dtype})"
    if "rand(" in reads:
        yield from ("", "def rand(*shape):", "    return torch.rand(shape, generator=g)")
    if "randint(" in reads:
        yield from ("", "def randint(low, high, shape):")
        yield "    return torch.randint(low, high, shape, generator=g)"


def _operands(program: Program) -> Iterator[tuple[str, str]]:
    for name, shape in (("q", _Q), ("k", _K), ("v", _V)):
        axes = shape.split(", ")
        lead = {2: [], 3: axes[:1], 4: axes[:2], 5: [axes[0], "2", axes[1]]}[program.sizes.rank]
        heads, (n, d) = lead[-1:], axes[2:]
        shapes = {
            "shape": [*lead, n, d],
            "tokens_first": [*lead[:-1], n, *heads, d],
            "transposed": [*lead, d, n],
            "longer": [*lead, f"{n} + 3", d],
            "one": [*("1" for _ in lead), n, d],
        }
        memory = MEMORY[program.memory]
        text = memory.format(**{key: ", ".join(value) for key, value in shapes.items()})
        yield name, text + ".requires_grad_()" * program.grad

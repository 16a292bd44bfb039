"""What a program adds to its scores, or multiplies them with, as lookups of a score program.

A bias is read from a tensor that the program itself computes; where it says nothing but what
follows from queries, keys or their distance alone, a smaller one is computed instead, and that of
all pairs need not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy
import torch
from torch.fx import GraphModule, Node

from sparse_compile.expr import COORDINATES, KV, N_KV, N_Q, SCORE, B, H, Q, ScoreProgram, learned
from sparse_compile.passes.graph_edit import example_value
from sparse_compile.passes.lift.emit import Emitter
from sparse_compile.passes.lift.lift import Lifter
from sparse_compile.passes.lift.masks import Keep, SiteMasks, aligned
from sparse_compile.passes.lift.slice import call_name, made_of, values_of
from sparse_compile.passes.lift.tabulated import DISTANCE, Span, settled, symbols_of
from sparse_compile.passes.lift.value import (
    ABSORBING,
    DIMS,
    Case,
    Cases,
    Value,
    is_data,
    mapped,
    merged,
    size_expr,
    substitute,
)
from sparse_compile.sites.operands import MaskOperand
from sparse_compile.sites.site import Computed, Refused

#: What is added to scores as a mask is larger, unless it is a logarithm.
_HUGE = 1e4
_MAY_MASK = Refused(
    "it adds a bias that may be a mask: its values are only known at run time, and may be as low "
    "as a mask's",
    "write the mask with torch.where or masked_fill on a bool tensor",
)


@dataclass(frozen=True)
class Bias:
    """What one operand contributes.

    Attributes:
        mark: the number of the operand.
        lookup: what scores read, over tensors of the score program.
        cases: of the elements of the tensor, over coordinates, or over a distance; None where it is
            the operand itself.
    """

    mark: int
    lookup: sympy.Expr
    cases: Cases | None = None


@dataclass
class Biases:
    """The tensors that the scores of an attention read, as they are found.

    Attributes:
        masks: what was asked.
        lifter: of the traced graph that computes them.
        emitter: of the program that computes them.
        direct: whether tensors for each pair are read as they are, whatever they follow from.
        dtypes: of the tensors.
        found: of each operand that contributes.
    """

    masks: SiteMasks
    lifter: Lifter
    emitter: Emitter
    direct: bool = False
    dtypes: list[str] = field(default_factory=list)
    found: list[Bias] = field(default_factory=list)
    _outputs: list[Node] = field(default_factory=list)
    _shown: list[str] = field(default_factory=list)

    def add(self, mark: int, operand: MaskOperand, cases: Cases) -> None:
        """What an operand contributes, given its element over the coordinates."""
        self._check_moderate(cases, bool(example_value(operand.node).requires_grad))
        cases = self._unfolded(cases)
        symbols = symbols_of(cases)
        if _is_beyond_integers(cases) or (self.direct and _reads_data(cases)):
            self._direct(mark, operand)
        elif not _reads_data(cases) and symbols <= set(COORDINATES):
            self.found.append(Bias(mark, _piecewise(cases)))
        elif {Q, KV} <= symbols:
            self._of_distances(mark, operand, cases)
        else:
            axes = tuple(c for c in COORDINATES if c in symbols)
            self._computed(mark, operand, cases, axes, axes)

    def _check_moderate(self, cases: Cases, trained: bool) -> None:
        """That data that is added holds no masks: nothing huge goes into it, and no logarithm.

        What a row yields that has nothing else would depend on these numbers. What is trained may
        be low, as far as scores can be told apart then.
        """
        if any(map(_is_masking, (value for _, value in cases))):
            raise _MAY_MASK
        most = _HUGE if not trained or self.masks.dtype.itemsize < 4 else -ABSORBING
        for made in self._made_of(cases):
            numbers = [arg for arg in made.args if isinstance(arg, float)]
            is_log = call_name(made) == "log" and not trained
            if is_log or any(abs(n) >= most for n in numbers):
                raise _MAY_MASK

    def _made_of(self, cases: Cases) -> set[Node]:
        """What computes the data of some cases, but for numbers by which parts of it are hidden."""
        front = self.lifter.nodes_of({at for _, value in cases for at in _lookups(value)})
        found: set[Node] = set()
        while front:
            node = front.pop()
            sources = self.lifter.sources.get(node)
            found |= set(made_of(node, follow=values_of) if sources is None else ())
            front |= sources or set()
        return found

    def _unfolded(self, cases: Cases) -> Cases:
        """Cases whose values are lookups by distance, where arithmetic can be said so."""
        found: list[Case] = []
        for condition, value in cases:
            whole = self._by_distance(value)
            if whole is None:
                found.append((condition, value))
            else:
                found += [(sympy.And(condition, c), v) for c, v in whole]
        return merged(found)

    def _by_distance(self, value: Value) -> Cases | None:
        """A lookup by query and key as one by distance, if it can be said so."""
        if not isinstance(value, sympy.Basic) or not is_data(value):
            return None
        whole = self.lifter.unfolded(value) if {Q, KV} <= value.free_symbols else None
        if whole is None:
            return None
        place = dict(zip(DIMS, value.args, strict=False))
        moved = substitute(whole.element, place)
        assert not isinstance(moved, sympy.Basic)
        return moved

    def _of_distances(self, mark: int, operand: MaskOperand, cases: Cases) -> None:
        shifted = mapped(cases, lambda expr: settled(expr.xreplace({KV: DISTANCE + Q})))
        assert not isinstance(shifted, sympy.Basic)
        symbols = symbols_of(shifted)
        if Q in symbols:
            self._direct(mark, operand)
            return
        others = tuple(c for c in COORDINATES if c in symbols)
        lengths = self.masks.lengths
        span = Span(DISTANCE, 1 - lengths[Q], lengths[Q] + lengths[KV] - 1)
        self._computed(mark, operand, shifted, others, (*others, KV - Q + N_Q - 1), span)

    def _computed(
        self,
        mark: int,
        operand: MaskOperand,
        cases: Cases,
        coordinates: Sequence[sympy.Symbol],
        indices: Sequence[sympy.Expr],
        *more: Span,
    ) -> None:
        axes = [Span(c, sympy.S.Zero, self.masks.lengths[c]) for c in coordinates]
        value = example_value(operand.node)
        node = self.emitter.element(cases, value.dtype, [*axes, *more])
        names = [*(c.name for c in coordinates), *["kv - q"] * len(more)]
        lookup = self._tensor(node, value.dtype, f"by {', '.join(names) or 'nothing'}")
        self.found.append(Bias(mark, lookup(*indices), cases))

    def _direct(self, mark: int, operand: MaskOperand) -> None:
        """The operand itself, however it is computed."""
        value, wanted = example_value(operand.node), self.masks.wanted[mark]
        graph, site = operand.node.graph, self.masks.site
        assert site.scope.gm.graph is graph
        # What is trained reads it again.
        until = graph.output_node() if torch.is_grad_enabled() else site.output.node
        if not self.masks.memory.stays(operand.node, wanted.reader, until):
            raise Refused(f"its bias `{operand.node.name}` is changed in place afterwards")
        places, node = self.masks.places(operand), self.emitter.given(operand.node)
        shape = list(value.shape)
        if operand.axes[:1] == ("bh",) and len(shape) == 3 and shape[0] != 1:
            heads = self.emitter.size(self.masks.lengths[H])
            sizes = [-1, heads, *(self.emitter.size(size_expr(n)) for n in shape[1:])]
            node = self.emitter.graph.call_function(torch.ops.aten.reshape.default, (node, sizes))
            places, shape = (B, H, *places[1:]), [2, 2, *shape[1:]]
        pairs = zip(aligned(len(shape), places), shape, strict=True)
        indices = [sympy.S.Zero if size == 1 else at for at, size in pairs]
        shown = f"tensor {list(map(str, value.shape))}".replace("'", "")
        lookup = self._tensor(node, value.dtype, shown)
        self.found.append(Bias(mark, lookup(*indices)))

    def _tensor(self, node: Node, dtype: torch.dtype, shown: str) -> sympy.Function:
        self._outputs.append(node)
        self._shown.append(shown)
        self.dtypes.append(str(dtype).removeprefix("torch."))
        return learned(len(self._outputs) - 1)

    def program(self) -> ScoreProgram | None:
        """What happens to the scaled products; None: nothing."""
        score = self.masks.site.score
        if score is None:
            return None
        program = self.program_of(score.value)
        return None if program.value == SCORE else program

    def program_of(self, value: sympy.Expr) -> ScoreProgram:
        """A value over marks of operands as one over what they contribute."""
        lookups = {one.mark: one.lookup for one in self.found}
        count = len(self.masks.site.masks)
        marks = {learned(i)(): lookups.get(i, sympy.S.Zero) for i in range(count)}
        return ScoreProgram(value.xreplace(marks), tuple(self.dtypes))

    def computed(self) -> Computed | None:
        """The program that computes the tensors."""
        if not self._outputs:
            return None
        leaves = self.emitter.finish(self._outputs)
        module = GraphModule(self.lifter.gm, self.emitter.graph)
        return Computed(module, leaves, self.masks.site.scope, tuple(self._shown))


def contributions(masks: SiteMasks, keeps: Sequence[Keep]) -> list[tuple[int, MaskOperand, Cases]]:
    """The operands that do more than to mask."""
    pairs = enumerate(zip(masks.site.masks, keeps, strict=True))
    return [(i, operand, keep.bias) for i, (operand, keep) in pairs if keep.bias is not None]


def _lookups(value: Value) -> set[sympy.Basic]:
    """The lookups of data in a value."""
    found: set[sympy.Basic] = set()
    if isinstance(value, sympy.Basic):
        found = value.atoms(sympy.core.function.AppliedUndef)
    return found


def _is_masking(value: Value) -> bool:
    """Whether a sum has a number in it that drowns scores, but for ``(1 - m) * min``.

    That is split where m is 0 or 1 (:mod:`.masks`), and nobody has an m that is neither.
    """
    if not isinstance(value, sympy.Basic):
        return False
    if all(abs(n) < -ABSORBING for n in value.atoms(sympy.Integer)):
        return False
    lookups = _lookups(value)
    slopes = [sympy.expand(value).coeff(lookup) for lookup in lookups]
    return len(slopes) != 1 or not slopes[0].is_number or abs(slopes[0]) < -ABSORBING


def _reads_data(cases: Cases) -> bool:
    parts = [part for case in cases for part in case if isinstance(part, sympy.Basic)]
    return any(part.atoms(sympy.core.function.AppliedUndef) for part in parts)


def _is_beyond_integers(cases: Cases) -> bool:
    """Whether a number does not fit the integers that indices are computed in."""
    values = (value for _, value in cases if isinstance(value, sympy.Basic))
    return any(abs(n) >= 1 << 62 for value in values for n in value.atoms(sympy.Integer))


def _piecewise(cases: Cases) -> sympy.Expr:
    """Numbers by conditions over the coordinates."""
    *first, (_, last) = ((c, sympy.sympify(value)) for c, value in cases)
    if not first:
        return last
    return sympy.Piecewise(*((value, c) for c, value in first), (last, True))


def check_sizes(program: ScoreProgram | None) -> None:
    """That no lookup of a score program has a size in it that only a call knows."""
    free = set() if program is None else program.value.free_symbols
    if free - {SCORE, *COORDINATES, N_Q, N_KV}:
        raise Refused(
            "it adds a bias at places that follow from sizes that are only known at run time",
            "compile it with dynamic=False, or mark those sizes with torch._dynamo.mark_static",
        )

"""From what was written down to a mask and a score program.

The text of :class:`sparse_compile.flex.record.Recorded` is read step by step into expressions of
sympy. Tensors that are indexed by places become tables of the mask, or, where they hold real
numbers, tensors of the score program.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from sparse_compile.errors import BadPattern, Inexpressible
from sparse_compile.expr import (
    COORDINATES,
    SCORE,
    FloorMod,
    MaskExpr,
    ScoreProgram,
    UnsupportedNode,
    is_learned,
    learned,
    size_symbol,
    table,
)
from sparse_compile.flex import reals
from sparse_compile.flex.reals import Real, is_real
from sparse_compile.flex.steps import as_steps
from sparse_compile.layout.intervals import UNKNOWN, Span, span
from sparse_compile.patterns.symbolic_ops import OPERATIONS, is_truth

#: Batch, query heads, queries and keys; None where they are known in a call only.
Lengths = tuple[int, int, int, int] | None

_TABLES = {"bool": "bool", "int64": "int64", "uint32": "int64", "uint64": "int64"}
_LEARNED = ("float32", "float16", "bfloat16")
_INSTEAD = (
    "Say it with + - * // %, comparisons, & | ~, torch.where and tensors indexed by b, h, q_idx "
    "and kv_idx, compute it before, outside of the function, as a tensor that it indexes, or call "
    "torch.nn.attention.flex_attention.flex_attention"
)


@dataclass(frozen=True)
class Program:
    """What a mask and a score function mean.

    Attributes:
        mask: who may attend to whom; it has the tables that the score reads, too.
        score: what becomes of the products; None where nothing does.
        tables: which of the recorded tensors are the tables of the mask.
        learned: which are the tensors of the score program.
    """

    mask: MaskExpr
    score: ScoreProgram | None
    tables: tuple[int, ...]
    learned: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def program_of(text: str, lengths: Lengths = None) -> Program:
    """Read a recorded text.

    Args:
        text: as in :class:`sparse_compile.flex.record.Recorded`.
        lengths: of the attention, to prove that indices count from the front.

    Raises:
        Inexpressible: no expression says it.
        BadPattern: an index reaches beyond its tensor.
    """
    *lines, results = text.split("\n")
    reader = _Reader(lengths)
    for line in lines:
        reader.read(line)
    mask, score = (reader.operand(_parsed(name)) if name else None for name in results.split(";"))
    return reader.program(mask, score)


def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


@dataclass(frozen=True)
class _Tensor:
    """A recorded tensor, with the indices that it got so far."""

    number: int
    dtype: str
    shape: tuple[sympy.Expr, ...]
    index: tuple[sympy.Expr, ...] = ()


class _Reader:
    """Reads lines; values are sympy expressions, :class:`Real` numbers and tensors."""

    def __init__(self, lengths: Lengths) -> None:
        self._values: dict[str, Any] = {}
        self._steps: dict[str, ast.Call] = {}
        self._tables: dict[int, int] = {}
        self._learned: dict[int, int] = {}
        self._dtypes: dict[int, str] = {}
        self._sizes: set[int] = set()
        self._lengths = lengths
        names = (*(str(symbol) for symbol in COORDINATES),)
        self._spans: dict[str, Span] = dict.fromkeys(names, UNKNOWN)
        if lengths is not None:
            for name, length in zip(names, lengths, strict=True):
                self._spans[name] = Span(0, max(0, length - 1), 1, max(1, length))

    def read(self, line: str) -> None:
        """One line that describes a tensor or a step."""
        if line[0] == "t":
            name, dtype, shape = line.split(" : ")
            sizes = tuple(sympy.sympify(self.operand(_parsed(size))) for size in _items(shape))
            self._values[name] = _Tensor(int(name[1:]), dtype.removeprefix("torch."), sizes)
            return
        name, step = line.split(" = ")
        call, _, dtype = step.partition(" : ")
        if not dtype:
            known = {str(symbol): symbol for symbol in COORDINATES}
            self._values[name] = known.get(call, Real(SCORE))
            return
        node = _parsed(call)
        assert isinstance(node, ast.Call)
        self._steps[name] = node
        self._values[name] = self._step(name, dtype.removeprefix("torch."))

    def operand(self, node: ast.expr) -> Any:
        """What an argument of a step stands for."""
        match node:
            case ast.Name(id=name) if name in self._values:
                return self._scalar(self._values[name])
            case ast.Name(id=name) if name[0] == "s" and name[1:].isdigit():
                return self._size(int(name[1:]))
            case ast.Name(id="inf"):
                return float("inf")
            case ast.Name(id="nan"):
                return float("nan")
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -self.operand(inner)
            case ast.Tuple(elts=items):
                return tuple(map(self.operand, items))
            case ast.Constant(value=value):
                return value
        return ast.unparse(node)  # a dtype or a device

    def _size(self, number: int) -> sympy.Symbol:
        self._sizes.add(number)
        self._spans.setdefault(f"s{number}", UNKNOWN)
        return size_symbol(number)

    def _scalar(self, value: Any) -> Any:
        """A tensor of one number as that number."""
        if isinstance(value, _Tensor) and len(value.index) == len(value.shape):
            return self._entry(value)
        return value

    def _step(self, step: str, dtype: str) -> Any:
        call = self._steps[step]
        assert isinstance(call.func, ast.Name)
        name = call.func.id.strip("_")
        if name == "getitem":
            return self._looked_up(*call.args)
        args = [self.operand(arg) for arg in call.args]
        options = {str(one.arg): self.operand(one.value) for one in call.keywords}
        if any(isinstance(value, _Tensor) for value in (*args, *options.values())):
            raise Inexpressible(
                f"sparse_compile: a mask_mod or score_mod calls {name} on a whole tensor. Index it "
                "by b, h, q_idx or kv_idx."
            )
        if "float" not in dtype and name not in reals.COMPARISONS and any(map(is_real, args)):
            return self._rounded(step, name, args)
        try:
            return self._operation(name, dtype)(*args, **options)
        except TypeError as error:
            raise _inexpressible(f"calls {name} in a way that is not known: {error}") from error

    def _operation(self, name: str, dtype: str) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            if "float" in dtype:
                if name not in reals.OPERATIONS:
                    raise _inexpressible(f"calls torch's {name}")
                return reals.OPERATIONS[name](*args, **options)
            if any(map(is_real, args)):
                return reals.compared(name, *args)
            return _whole_operation(name)(*map(_sympified, args), **_renamed(options))

        return operation

    def _rounded(self, step: str, name: str, args: list[Any]) -> Any:
        """A whole number that is made of a real one."""
        found, source = None, args[0]
        if isinstance(source, Real) and source.finite == sympy.true and self._lengths is not None:
            if not source.value.has(SCORE):
                found = as_steps(step, self._steps, source.value, self._lengths)
        if found is None:
            raise _inexpressible(f"makes a whole number of a real one ({name})")
        return found

    def _looked_up(self, table_of: ast.expr, places: ast.expr) -> Any:
        assert isinstance(table_of, ast.Name)
        tensor = self._values[table_of.id]
        if not isinstance(tensor, _Tensor):
            raise _inexpressible("indexes what it computed")
        assert isinstance(places, ast.Tuple)
        index = list(tensor.index)
        for place in places.elts:
            index.append(self._index(tensor, len(index), self.operand(place)))
        return _Tensor(tensor.number, tensor.dtype, tensor.shape, tuple(index))

    def _index(self, tensor: _Tensor, axis: int, place: Any) -> sympy.Expr:
        """An index of an axis, counted from the front."""
        if is_truth(place) or isinstance(place, Real):
            raise _inexpressible("indexes a tensor by what is no whole number")
        place, size = sympy.sympify(place), tensor.shape[axis]
        reach = span(place, self._spans, lambda *_: UNKNOWN)
        low, high = reach.lo, reach.hi
        known = reach is not UNKNOWN and isinstance(low, int) and isinstance(high, int)
        beyond = known and size.is_Integer and (high >= int(size) or low < -int(size))
        # Of a sum of places the reach is what it takes; of other numbers it may be too wide.
        if beyond and place.is_polynomial() and sympy.total_degree(place) <= 1:
            raise BadPattern(
                f"sparse_compile: a mask_mod or score_mod reads a tensor of shape "
                f"{list(tensor.shape)} at {place}, which goes from {low} to {high}. "
                "Pass a tensor of that size, or clamp the index."
            )
        if place.is_nonnegative or (known and low >= 0):
            return place
        if known and high < 0:
            return place + size
        return FloorMod(place, size)

    def _entry(self, tensor: _Tensor) -> Any:
        number, dtype = tensor.number, tensor.dtype
        self._dtypes[number] = dtype
        if "float" in dtype:
            which = self._learned.setdefault(number, len(self._learned))
            return Real(learned(which)(*(tensor.index or (sympy.S.Zero,))))
        if "complex" in dtype:
            raise _inexpressible("reads a tensor of complex numbers")
        which = self._tables.setdefault(number, len(self._tables))
        entry = table(which)(*(tensor.index or (sympy.S.Zero,)))
        return sympy.Ne(entry, 0) if dtype == "bool" else entry

    def program(self, mask: Any, score: Any) -> Program:
        """What the results mean."""
        if mask is not None and not is_truth(mask):
            kind = "a real" if isinstance(mask, Real) else "a whole"
            raise Inexpressible(
                f"sparse_compile: mask_mod returns {kind} number, not a bool. Return a comparison, "
                "such as != 0."
            )
        program, hides = None, sympy.true
        if score is not None:
            score = reals.real(score)
            program, hides = score.value, score.finite
        predicate = sympy.And(sympy.true if mask is None else mask, hides)
        if predicate.has(SCORE) or any(map(is_learned, predicate.atoms(sympy.Function))):
            raise _inexpressible("hides pairs by real numbers, such as scores")
        try:
            span(predicate, self._spans, lambda *_: UNKNOWN)
        except UnsupportedNode as error:
            raise _inexpressible(f"compares real numbers, in {predicate}") from error
        dtypes = tuple(_TABLES.get(self._dtypes[number], "int32") for number in self._tables)
        names = tuple(
            dtype if (dtype := self._dtypes[number]) in _LEARNED else "float32"
            for number in self._learned
        )
        plain = program is None or program == SCORE
        return Program(
            MaskExpr(predicate, dtypes, max(self._sizes, default=-1) + 1),
            None if plain else ScoreProgram(program, names),
            tuple(self._tables),
            () if plain else tuple(self._learned),
        )


def _items(shape: str) -> list[str]:
    return [part for part in shape.strip("()").split(",") if part]


def _sympified(value: Any) -> Any:
    """A number of Python as one of sympy."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, float):
        if not value.is_integer():
            raise _inexpressible(f"computes a whole number from {value}")
        return sympy.Integer(int(value))
    return sympy.Integer(value) if isinstance(value, int) else value


def _renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    names = {"size": "shape", "fill_value": "value"}
    return {names.get(name, name): _sympified(value) for name, value in options.items()}


def _whole_operation(name: str) -> Callable[..., Any]:
    more: dict[str, Callable[..., Any]] = {
        "square": lambda a: a * a,
        "pow": _power,
        "masked_fill": lambda a, condition, value: OPERATIONS["where"](condition, value, a),
        **dict.fromkeys(("clone", "detach", "contiguous"), lambda a, **_: a),
        **dict.fromkeys(("short", "byte", "char", "type_as", "type"), lambda a, *_: a),
    }
    found = more.get(name) or OPERATIONS.get(name)
    if found is None:
        raise _inexpressible(f"calls torch's {name}")
    return found


def _power(a: Any, exponent: Any) -> Any:
    if not (isinstance(exponent, sympy.Integer) and exponent >= 0):
        raise _inexpressible("raises to a power that is no constant")
    return a**exponent


def _inexpressible(what: str) -> Inexpressible:
    return Inexpressible(f"sparse_compile: a mask_mod or score_mod {what}. {_INSTEAD}.")

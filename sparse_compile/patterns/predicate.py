"""Predicate: a mask function of FlexAttention as a pattern; what it computes, as an expression.

A function of ``(b, h, q, kv)`` is called with stand-ins that write down what is done to them. A
tensor of its closure that is indexed by them becomes a table.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy

from sparse_compile.errors import BadPattern
from sparse_compile.expr.nodes import COORDINATES, KV, B, FloorMod, H, Q
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import bad
from sparse_compile.patterns.data import dtype_of, is_tensor, same
from sparse_compile.patterns.symbolic_ops import OPERATIONS, is_truth

_IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in "add sub mul floordiv mod".split())}
_IN_PLACE |= {f"__i{name}__" for name in "truediv pow and or xor lshift rshift".split()}


@dataclass(frozen=True, repr=False)
class Predicate(Pattern):
    """Attention where a function of the coordinates says so, as FlexAttention's ``mask_mod`` does.

    The function is never run on numbers: it is called once with symbols, and what it does to them
    is the mask. So it may compute ``+ - * // %``, compare, combine by ``& | ~`` and
    ``torch.where``, and index tensors of integers or bools by the coordinates; but no ``if`` or
    ``and`` can depend on them. The tensors are read when attention runs, so they may change.

    Two predicates are equal when their functions are the same object.

    Args:
        fn: ``fn(b, h, q, kv)``, true where query ``q`` may attend to key ``kv``.
        name: how it prints; the name of the function unless given.

    >>> Predicate(lambda b, h, q, kv: (kv <= q) & (kv % 2 == 0)).dense(4, 4).int().tolist()
    [[[[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0]]]]
    """

    fn: Callable[[Any, Any, Any, Any], Any]
    name: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.fn, Pattern) or not callable(self.fn):
            raise bad(f"Predicate({self.fn!r}) is no function", "Pass one of (b, h, q, kv).")

    def __repr__(self) -> str:
        called = self.name or getattr(self.fn, "__name__", None) or repr(self.fn)
        return f"Predicate({called})"

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """Tensors must reach as far as the coordinates that index them."""
        _, reads = self._traced(Tables())
        lengths = {B: batch, H: heads, Q: n_q, KV: n_kv}
        for tensor, index in reads.seen:
            for size, place in zip(tensor.shape, index, strict=True):
                if place in lengths and size < lengths[place]:
                    raise bad(
                        f"{self!r} reads a tensor of {list(tensor.shape)} at {place}, which goes "
                        f"up to {lengths[place] - 1}",
                        "Pass a tensor of that size.",
                    )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """What the function returns for symbols; the same each time, or it is no mask."""
        first, reads = self._traced(Tables())
        second, again = self._traced(Tables())
        if first != second:
            raise bad(
                f"{self!r} says {first} and, called again, {second}",
                "A mask function must depend on its arguments only.",
            )
        # Tensors that the function makes itself are others each time, but must hold the same.
        pairs = zip(reads.seen, again.seen, strict=True)
        if not all(same(one, other) for (one, _), (other, _) in pairs):
            raise bad(
                f"{self!r} makes a tensor that differs from call to call",
                "Make it outside, and let the function only read it.",
            )
        if not is_truth(first):
            raise bad(
                f"{self!r} returns {first}, which is neither true nor false",
                "Return a comparison, such as != 0.",
            )
        return self._traced(tables)[0]

    def _traced(self, tables: Tables) -> tuple[Any, Reads]:
        return symbolic_call(self.fn, COORDINATES, tables)


class Reads:
    """The tensors that a function reads while it is traced, as tables.

    Attributes:
        tables: where they are added.
        seen: each tensor with the index expressions that it is read at.
    """

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.seen: list[tuple[Any, tuple[sympy.Expr, ...]]] = []

    def lookup(self, tensor: Any, index: tuple[sympy.Expr, ...]) -> Symbolic:
        """The entry of a tensor at as many indices as it has dimensions."""
        if tensor.is_floating_point() or tensor.is_complex():
            raise bad(
                f"the mask function reads a tensor of {tensor.dtype}",
                "Compare it before, outside of the function, and read the bools.",
            )
        self.seen.append((tensor, index))
        entry = self.tables.holding(tensor)(*index)
        return Symbolic(sympy.Ne(entry, 0) if dtype_of(tensor) == "bool" else entry, self)

    def expression(self, value: Any) -> Any:
        """An argument of an operation: an expression, or what cannot be one as it is."""
        if isinstance(value, Symbolic):
            return value.expr
        if isinstance(value, bool):
            return sympy.true if value else sympy.false
        if isinstance(value, int):
            return sympy.Integer(value)
        if isinstance(value, float):
            return _whole_float(value)
        if is_tensor(value):
            if value.dim():
                raise bad(
                    f"the mask function computes with a whole tensor of {list(value.shape)}",
                    "Index it by b, h, q or kv, as in lengths[b].",
                )
            return self.lookup(value, ()).expr
        return value


class Symbolic:
    """An integer or a truth value that depends on the coordinates."""

    __hash__ = None  # type: ignore[assignment]  # an expression is equal to nothing yet

    def __init__(self, expr: sympy.Basic, reads: Reads) -> None:
        self.expr, self.reads = expr, reads

    def __repr__(self) -> str:
        return f"<{self.expr}>"

    def __bool__(self) -> bool:
        raise bad(
            f"the mask function asks whether {self.expr} is true, which differs from query to "
            "query",
            "Write & for `and`, | for `or`, ~ for `not`, and torch.where(...) for `if`.",
        )

    #: Coordinates are on none; functions of transformers ask, to move to it what they compute.
    device = "cpu"

    def __getattr__(self, name: str) -> Any:
        if name not in OPERATIONS:
            raise AttributeError(f"coordinates have no {name!r}")
        return functools.partial(_operate, name, self)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _torch_call(func, args, kwargs or {})


class _Rows:
    """A tensor indexed by fewer coordinates than it has dimensions."""

    def __init__(self, tensor: Any, index: tuple[sympy.Expr, ...], reads: Reads) -> None:
        self.tensor, self.index, self.reads = tensor, index, reads

    def __getitem__(self, index: Any) -> Any:
        return _read(self.tensor, self.index, index, self.reads)


def symbolic_call(
    function: Callable[..., Any], coordinates: tuple[sympy.Symbol, ...], tables: Tables
) -> tuple[Any, Reads]:
    """What ``function`` makes of the coordinates, and the tensors that it reads.

    Raises:
        BadPattern: if it does what no expression can say.
    """
    reads = Reads(tables)
    name = getattr(function, "__name__", repr(function))
    with _torch_watched():
        try:
            value = function(*(Symbolic(symbol, reads) for symbol in coordinates))
            return reads.expression(value), reads
        except (TypeError, AttributeError, IndexError) as error:
            raise bad(
                f"the mask function {name} cannot be traced: {error}",
                "Use + - * // % comparisons & | ~ torch.where and tensors indexed by b, h, q, kv.",
            ) from error
        except BadPattern as error:
            raise BadPattern(f"{error} (In {name}.)") from error


def _operate(name: str, *args: Any, **kwargs: Any) -> Any:
    """The operation called ``name`` on numbers, coordinates and 0-dimensional tensors."""
    values = [*args, *kwargs.values()]
    reads = next(value.reads for value in values if isinstance(value, (Symbolic, _Rows)))
    if any(isinstance(value, _Rows) for value in values):
        raise bad(
            "the mask function computes with a row of a tensor",
            "Index it by as many coordinates as it has dimensions.",
        )
    operands = [reads.expression(value) for value in args]
    options = {key: reads.expression(value) for key, value in kwargs.items()}
    return Symbolic(OPERATIONS[name](*operands, **options), reads)


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: _operate(name, self, *others)


for _name in (
    "add radd sub rsub mul rmul floordiv rfloordiv mod rmod truediv rtruediv neg pos abs "
    "lt le gt ge eq ne and rand or ror xor rxor invert lshift rshift"
).split():
    setattr(Symbolic, f"__{_name}__", _operator(_name))


def _read(tensor: Any, before: tuple[sympy.Expr, ...], index: Any, reads: Reads) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    found = list(before)
    for part in parts:
        expr = reads.expression(part)
        if not isinstance(expr, sympy.Expr) or is_truth(expr):
            raise bad(
                f"the mask function indexes a tensor by {part!r}",
                "Use integers and b, h, q, kv; slice the tensor before, outside of the function.",
            )
        if len(found) >= tensor.dim():
            raise IndexError(f"too many indices for a tensor of {list(tensor.shape)}")
        # Negative indices count from the end.
        size = tensor.shape[len(found)]
        found.append(expr if expr.is_nonnegative else FloorMod(expr, size))
    if len(found) == tensor.dim():
        return reads.lookup(tensor, tuple(found))
    return _Rows(tensor, tuple(found), reads)


def _whole_float(value: float) -> sympy.Integer:
    if not value.is_integer():
        raise bad(f"the mask function computes with {value}", "Use whole numbers only.")
    return sympy.Integer(int(value))


def _torch_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of a torch function inside a mask function."""
    name = getattr(func, "__name__", str(func))
    if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs:
        raise bad(
            f"the mask function changes a tensor in place ({name.strip('_')})",
            "Compute the tensor before, and let the function only read it.",
        )
    reads = _reads_of([*args, *kwargs.values()])
    if reads is None:
        return func(*args, **kwargs)
    plain = name.strip("_")
    if plain == "getitem":
        tensor, index = args
        return _read(tensor, (), index, reads)
    if plain not in OPERATIONS:
        raise bad(
            f"the mask function calls torch's {plain} on coordinates",
            "Use + - * // % comparisons & | ~ torch.where, minimum, maximum, clamp, abs.",
        )
    return _operate(plain, *args, **kwargs)


def _reads_of(values: Any) -> Reads | None:
    """Those of the first symbolic value among some or in their lists; None where there is none."""
    for value in values:
        if isinstance(value, (Symbolic, _Rows)):
            return value.reads
        found = _reads_of(value) if isinstance(value, (tuple, list)) else None
        if found is not None:
            return found
    return None


def _torch_watched() -> contextlib.AbstractContextManager[Any]:
    """Sees every call of a torch function, such as ``tensor[q]``; nothing without torch."""
    if "torch" not in sys.modules:
        return contextlib.nullcontext()
    watched: contextlib.AbstractContextManager[Any] = _watch_mode()()
    return watched


@functools.cache
def _watch_mode() -> Any:
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            return _torch_call(func, args, kwargs or {})

    return Watch

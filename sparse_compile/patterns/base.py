"""Pattern: the base of the mask algebra. A pattern is a frozen value that names a predicate.

A pattern holds parameters only. Its one method that subclasses write, :meth:`Pattern.predicate`,
spells who may attend to whom as a sympy Boolean; the dense definition, the block layout and the
code of the kernels all follow from that.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy

from sparse_compile.errors import PatternMisuse
from sparse_compile.expr.mask_expr import MaskExpr
from sparse_compile.expr.nodes import table
from sparse_compile.patterns.data import spelled

#: Makes the data of a table when it is needed: ``values(device, n_q, n_kv, batch, heads)``.
TableMaker = Callable[..., Any]


class Tables:
    """The tables that the predicate of a pattern reads, collected while it is spelled."""

    def __init__(self) -> None:
        self.makers: list[TableMaker] = []
        self.dtypes: list[str] = []
        self._known: dict[Any, int] = {}

    def add(self, key: Any, dtype: str, make: TableMaker) -> Any:
        """A table as a function of its coordinates; equal keys share one table.

        Args:
            key: hashable identity of the data.
            dtype: ``"bool"``, ``"int32"`` or ``"int64"``.
            make: ``make(device, n_q, n_kv, batch, heads)`` gives the tensor on ``device``.
        """
        if key not in self._known:
            self._known[key] = len(self.makers)
            self.makers.append(make)
            self.dtypes.append(dtype)
        return table(self._known[key])


@dataclass(frozen=True)
class BoundMask:
    """A pattern as the rest of the library reads it: a predicate, and how to make its tables.

    Attributes:
        expr: the predicate.
        makers: for each table ``t0, t1, ...``, what makes its tensor.
    """

    expr: MaskExpr
    makers: tuple[TableMaker, ...] = field(default=(), compare=False)

    def trimmed(self) -> BoundMask:
        """The same without tables that the predicate does not read, the others numbered anew.

        Simplification may leave a table unread.
        """
        expr, used = self.expr.trimmed()
        return BoundMask(expr, tuple(self.makers[number] for number in used))

    def tables(self, device: Any, n_q: int, n_kv: int, batch: int, heads: int) -> list[Any]:
        """The tensors of the tables on ``device``, for a problem of this size."""
        return [make(device, n_q, n_kv, batch, heads) for make in self.makers]


class Pattern:
    """Base of all patterns. Combine them with ``&``, ``|`` and ``~``."""

    def predicate(self, tables: Tables) -> sympy.Basic:
        """The sympy Boolean over ``b, h, q, kv``, the lengths and tables of ``tables``."""
        raise NotImplementedError

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """Raise if the pattern does not fit a problem of this size; before anything runs."""

    def bound(self) -> BoundMask:
        """The predicate with its tables."""
        tables = Tables()
        expr = self.predicate(tables)
        return BoundMask(MaskExpr(expr, tuple(tables.dtypes)), tuple(tables.makers))

    def dense(
        self, n_q: int, n_kv: int, batch: int = 1, heads: int = 1, device: Any = "cpu"
    ) -> Any:
        """The mask as a bool tensor [batch or 1, heads or 1, n_q, n_kv]; True may attend."""
        return _home("dense")(self, n_q, n_kv, batch, heads, device)

    def layout(
        self,
        n_q: int,
        n_kv: int,
        block: tuple[int, int] | None = None,
        device: Any = None,
        batch: int = 1,
        heads: int = 1,
    ) -> Any:
        """The blocks that the pattern visits, as a :class:`sparse_compile.layout.Layout`."""
        return _home("layout")(self, n_q, n_kv, block, device, batch, heads)

    def implied(self) -> dict[str, Any]:
        """Parameters that need not be written, beyond plain defaults: what they are by default."""
        return {}

    def __repr__(self) -> str:
        return constructor_call(self, self.implied())

    def __and__(self, other: Pattern) -> Pattern:
        return _compose("And", self, other, "&")

    def __or__(self, other: Pattern) -> Pattern:
        return _compose("Or", self, other, "|")

    def __invert__(self) -> Pattern:
        return _compose("Not", self, None, "~")

    def __bool__(self) -> bool:
        raise PatternMisuse(
            "sparse_compile: a pattern is neither true nor false, so `and`, `or` and `not` cannot "
            f"combine it. Write `&`, `|` and `~`, as in {self!r} & other."
        )


def constructor_call(value: Any, implied: Mapping[str, Any] | None = None) -> str:
    """The call that makes a dataclass, without arguments that are the default or implied."""
    return f"{type(value).__name__}({', '.join(_arguments(value, implied or {}))})"


def _arguments(value: Any, implied: Mapping[str, Any]) -> Iterator[str]:
    # What a base class adds by keyword comes first among the fields, but last in a call.
    for parameter in sorted(
        dataclasses.fields(value), key=lambda parameter: parameter.kw_only is True
    ):
        text = spelled(getattr(value, parameter.name))
        default = implied.get(parameter.name, parameter.default)
        if default is dataclasses.MISSING:
            yield text
        elif text != spelled(default):
            yield f"{parameter.name}={text}"


def _home(name: str) -> Callable[..., Any]:
    # Layouts need torch, patterns do not: they meet when asked for.
    function: Callable[..., Any] = getattr(
        importlib.import_module("sparse_compile.layout.of_pattern"), name
    )
    return function


def _compose(name: str, left: Pattern, right: Pattern | None, operator: str) -> Pattern:
    from sparse_compile.patterns import logic  # which torch.compile can trace

    compose: Callable[..., Pattern] = getattr(logic, name)
    if right is None:
        return compose(left)
    if not isinstance(right, Pattern):
        raise PatternMisuse(
            f"sparse_compile: cannot combine {left!r} {operator} {right!r}: the right side is no "
            "pattern. Wrap a function of (b, h, q, kv) in Predicate(...)."
        )
    return compose(left, right)

"""Names of patterns for calls of attention, which torch.compile takes for constants; and plans."""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
import weakref
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor

from sparse_compile.codegen.generators import ShapeNeed
from sparse_compile.errors import PatternMisuse
from sparse_compile.expr import KV, MaskExpr, Q, ScoreProgram
from sparse_compile.expr import score as score_programs
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.ops.selection import name_selecting
from sparse_compile.ops.untraced import untraced
from sparse_compile.passes.decide.pick import views_for
from sparse_compile.patterns.base import And, BoundMask, Not, Or, Pattern
from sparse_compile.patterns.scored import Scored
from sparse_compile.patterns.scorers import Scorer
from sparse_compile.patterns.selecting import Selected, Selecting
from sparse_compile.selection.split import selects, split, without_selection
from sparse_compile.sites.annotation import name_mask
from sparse_compile.sites.named import INDEX, LISTS, NamedMask, NamedPart
from sparse_compile.spec import AttentionSpec, are_blocks


@dataclass(frozen=True)
class Direct:
    """What runs for a mask on a device.

    Attributes:
        static: text of the spec of its static part; empty without one.
        spec: text of the spec of all of it; empty to leave it to SDPA.
        blocks: text of the spec if what is selected are blocks for the kernels of blocks.
        causal: whether SDPA is.
    """

    static: str
    spec: str
    blocks: str = ""
    causal: bool = False


def name_of(pattern: Pattern, given: list[Tensor]) -> str:
    """The text of the :class:`NamedMask` of a pattern; remembered.

    Args:
        pattern: who may attend to whom.
        given: gets the tensors that are to be arguments of the operators: those it selects by.

    Raises:
        PatternMisuse, BadPattern: as :func:`split` does.
    """
    # torch.compile runs this: it sees the parameters even of a pattern that the compiled code makes
    # itself, and guards on them. Of a tensor it would bake the values in, unless it selects by it;
    # it guards on the identity of a pattern that holds one.
    text: str = _name_of_spelled(_spelled(pattern, given))
    return text


#: The texts of living patterns by their identity, where they select by no tensors.
_TEXTS: dict[int, str] = {}


def name_at_once(pattern: Pattern, given: list[Tensor]) -> str:
    """:func:`name_of` outside of compiled code: asked for once, since patterns do not change."""
    text = _TEXTS.get(id(pattern))
    if text is None:
        text = name_of(pattern, given)
        if not given:
            _TEXTS[id(pattern)] = text
            weakref.finalize(pattern, _TEXTS.pop, id(pattern), None)
    return text


@functools.lru_cache(maxsize=1024)
@untraced
def planned(text: str, device: str, shape: ProblemShape, sunk: bool = False) -> Direct:
    """What runs for a named mask on a type of device, at about these sizes.

    SDPA knows no score programs, and does not return what sinks (``sunk``) need.
    """
    named = NamedMask.parse(text)
    static = None if named.static is None else _in_views(named.static.mask, device, shape)
    if named.selected is None:
        assert static is not None
        causal = bool(static.mask.predicate == sympy.Le(KV, Q))
        plain = named.score is None and not sunk
        if plain and (causal or static.mask.predicate == sympy.true):
            return Direct(static.text, "", causal=causal)
        return Direct(static.text, _scored(static, named.score))
    expr, units = named.selected.mask, named.units
    if static is not None:
        return Direct(static.text, _scored(static.with_units(expr, *units), named.score))
    spec, blocks = _scored(AttentionSpec.of_units(expr, *units), named.score), ""
    if are_blocks(*units, device):
        blocks = _scored(AttentionSpec.of_listed_blocks(expr, *units), named.score)
    return Direct("", spec, blocks)


def _in_views(mask: MaskExpr, device: str, shape: ProblemShape) -> AttentionSpec:
    return views_for(mask, ShapeNeed.on(device), shape)[0]


def _scored(spec: AttentionSpec, score: ScoreProgram | None) -> str:
    return replace(spec, score=score).text


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def capped(text: str, softcap: float) -> str:
    """The text of a :class:`NamedMask`, of scores with a softcap."""
    return replace(NamedMask.parse(text), score=score_programs.softcap(softcap)).text


def _is_plain(value: object) -> bool:
    """Whether a parameter of a pattern is made of numbers, words and tuples only."""
    if isinstance(value, (Pattern, Scorer)):
        names = getattr(type(value), "__dataclass_fields__", None)
        return names is not None and all([_is_plain(getattr(value, name)) for name in names])
    if isinstance(value, tuple):
        return all([_is_plain(item) for item in value])
    return value is None or isinstance(value, (int, float, str))


def _is_opened(pattern: Pattern) -> bool:
    """Whether it is told by its parts: the tensors that it selects by may be others next time."""
    if isinstance(pattern, Scored):
        return bool(getattr(pattern.scorer, "tensors", ()))
    return isinstance(pattern, (And, Or, Not)) or (
        type(pattern) is Selected and isinstance(pattern.index, Tensor)
    )


def _spelled(value: Any, given: list[Tensor]) -> Any:
    """A parameter as nested tuples, types first; for a tensor, its number in ``given``."""
    if isinstance(value, Pattern) and not (_is_opened(value) or _is_plain(value)):
        return (Pattern, (_number_of(id(value)),))
    if isinstance(value, (Pattern, Scorer)):
        names = type(value).__dataclass_fields__  # type: ignore[union-attr]
        return (type(value), tuple([_spelled(getattr(value, name), given) for name in names]))
    if isinstance(value, tuple):
        return (tuple, tuple([_spelled(item, given) for item in value]))
    if isinstance(value, Tensor):
        for number, tensor in enumerate(given):
            if tensor is value:
                return number
        given.append(value)
        return len(given) - 1
    # A number that torch.compile would keep symbolic becomes a constant, with a guard.
    return operator.index(value) if type(value) is not bool and isinstance(value, int) else value


def _unspelled(spelled: Any) -> Any:
    if not isinstance(spelled, tuple):
        return spelled
    kind, values = spelled
    if kind is Pattern:
        return _NUMBERED[values[0]]
    values = tuple(map(_unspelled, values))
    if kind is tuple:
        return values
    pattern = object.__new__(kind)
    for name, value in zip(kind.__dataclass_fields__, values, strict=True):
        object.__setattr__(pattern, name, value)
    return pattern


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _name_of_spelled(spelled: Any) -> str:
    if spelled not in _NAMES:
        pattern = _unspelled(spelled)
        owners = _numbered_in(spelled)
        if not owners:
            _KEPT.append(pattern)  # graphs may name its tables from now on
        _NAMES[spelled] = _named(pattern, *owners[:1]).text
        for owner in owners:
            weakref.finalize(owner, _NAMES.pop, spelled, None)
    return _NAMES[spelled]


_KEPT: list[Pattern] = []


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _number_of(address: int) -> int:
    """A number for a pattern that holds tensors, given to no other."""
    if address not in _NUMBERS:
        pattern, number = _at(address), next(_COUNT)
        _NUMBERS[address], _NUMBERED[number] = number, pattern
        weakref.finalize(pattern, _NUMBERS.pop, address, None)
    return _NUMBERS[address]


_COUNT = itertools.count()
_NUMBERS: dict[int, int] = {}
_NUMBERED: weakref.WeakValueDictionary[int, Pattern] = weakref.WeakValueDictionary()


def _numbered_in(spelled: Any) -> list[Pattern]:
    """The parts of a pattern that are spelled by their numbers."""
    if not isinstance(spelled, tuple):
        return []
    kind, values = spelled
    if kind is Pattern:
        return [_unspelled(spelled)]
    return [owner for value in values for owner in _numbered_in(value)]


#: By the spelling of a pattern, in which one with tensors has a number: equal tensors may come to
#: differ.
_NAMES: dict[Any, str] = {}


def _at(address: int) -> Pattern:
    """The pattern whose ``id`` this is; the caller keeps it alive.

    Before torch 2.13, torch.compile hands no frozen dataclass to a function whose result it takes
    for constant, but it does hand an ``id``, and guards on it. Where the code that is compiled
    makes the pattern, there is none yet, and the ``id`` is that of what stands for it.

    Raises:
        PatternMisuse: the compiled code makes it.
    """
    found: Any = ctypes.cast(address, ctypes.py_object).value
    if isinstance(found, Pattern) and (vars(found) or not hasattr(found, "__dataclass_fields__")):
        return found
    name = type(getattr(found, "value", found)).__name__
    raise PatternMisuse(
        f"sparse_compile: attention() got a {name} that the compiled code makes from tensors or "
        "functions. Make it outside of that, and change its tensors in place."
    )


def _named(pattern: Pattern, owner: Pattern | None = None) -> NamedMask:
    """A pattern as text; graphs can find its tables as long as ``owner``, or it, lives."""
    owner = pattern if owner is None else owner
    if not selects(pattern):
        return NamedMask(_part(pattern.bound().trimmed(), owner))
    parts = split(pattern)
    if parts.selected is None:
        return NamedMask(_part(without_selection(pattern).bound().trimmed(), owner))
    static = None if parts.static is None else _part(parts.static.trimmed(), owner)
    leaf, selected = parts.leaf, _part(parts.selected, owner)
    chosen = _given(leaf) or name_selecting(leaf, owner)
    return NamedMask(static, selected, chosen, (leaf.unit_q, leaf.unit_kv), repr(leaf))


def _part(bound: BoundMask, owner: Pattern) -> NamedPart:
    return NamedPart(bound.expr, name_mask(bound, owner) if bound.expr.tables else "")


def _given(leaf: Selecting) -> str:
    """What the caller gives in the place of what selects; empty if nothing."""
    # Indices that are tensors have a number in their place.
    if type(leaf) is not Selected or not isinstance(leaf.index, int):
        return ""
    return INDEX if leaf.count is None else LISTS

"""Plans of patterns for calls of attention, and how torch.compile finds them again.

A plan is made of plain values, by functions whose results torch.compile takes for constants.
"""

from __future__ import annotations

import ctypes
import itertools
import operator
import weakref
from typing import Any

import sympy
import torch
from torch import Tensor

from sparse_compile.api.data import Tables, data_of
from sparse_compile.api.selected import SelectedPart, Sizes, plan_selected, planned
from sparse_compile.errors import PatternMisuse
from sparse_compile.expr import KV, Q
from sparse_compile.patterns.base import Pattern
from sparse_compile.patterns.logic import And, Not, Or
from sparse_compile.patterns.scored import Scored
from sparse_compile.patterns.scorers import Scorer
from sparse_compile.patterns.selected import Selected
from sparse_compile.selection.split import selects, without_selection

#: Text of the spec, empty to leave it to SDPA; key of the mask; index, rank and dtype of each
#: table; whether SDPA is causal; what is selected besides, None if nothing is. Plain values, which
#: torch.compile takes for constants.
Direct = tuple[str, str, Tables, bool, SelectedPart | None]
NOTHING_HIDDEN: Direct = ("", "", (), False, None)


def plan_of(pattern: Pattern, device: str, sizes: Sizes, given: list[Tensor]) -> Direct:
    """What runs for a pattern on a type of device, at about these sizes; remembered.

    Args:
        pattern: who may attend to whom.
        device: a type of device.
        sizes: what views are chosen for.
        given: gets the tensors that are to be arguments of the operators: those it selects by.
    """
    # torch.compile runs this: it sees the parameters even of a pattern that the compiled code makes
    # itself, and guards on them. Of a tensor it would bake the values in, unless it selects by it;
    # it guards on the identity of a pattern that holds one.
    if _is_opened(pattern) or _is_plain(pattern):
        plan: Direct = _plan_of_spelled(_spelled(pattern, given), device, sizes)
    else:
        plan = _plan_of_object(id(pattern), device, sizes)
    return plan


def static_data(
    q: Tensor, k: Tensor, mask: Pattern, plan: Direct
) -> tuple[list[Tensor], list[Tensor]]:
    """The tables of the static part of a pattern, and the lists of its blocks."""
    text, key, tables, _, selected = plan
    if selected is not None and not torch.compiler.is_compiling():
        mask = without_selection(mask)
    lengths = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    return data_of(mask, (key, tables, lengths, k.shape[1], text, q.device))


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
        return _NUMBERED[values[0]]()
    values = tuple(map(_unspelled, values))
    if kind is tuple:
        return values
    pattern = object.__new__(kind)
    for name, value in zip(kind.__dataclass_fields__, values, strict=True):
        object.__setattr__(pattern, name, value)
    return pattern


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _plan_of_spelled(spelled: Any, device: str, sizes: Sizes) -> Direct:
    key = (spelled, device, sizes)
    if key not in _PLANS:
        pattern = _unspelled(spelled)
        owners = _numbered_in(pattern, spelled)
        if not owners:
            _KEPT.append(pattern)  # graphs may name its tables from now on
        _PLANS[key] = plan_direct(pattern, device, sizes, *owners[:1])
        for owner in owners:
            weakref.finalize(owner, _PLANS.pop, key, None)
    return _PLANS[key]


_KEPT: list[Pattern] = []


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _number_of(address: int) -> int:
    """A number for a pattern that holds tensors, given to no other."""
    pattern = _at(address)
    if id(pattern) not in _NUMBERS:
        number = _NUMBERS[id(pattern)] = next(_COUNT)
        _NUMBERED[number] = weakref.ref(pattern)
        weakref.finalize(pattern, _NUMBERS.pop, id(pattern), None)
        weakref.finalize(pattern, _NUMBERED.pop, number, None)
    return _NUMBERS[id(pattern)]


_COUNT = itertools.count()
_NUMBERS: dict[int, int] = {}
_NUMBERED: dict[int, weakref.ref[Pattern]] = {}


def _numbered_in(pattern: Any, spelled: Any) -> list[Pattern]:
    """The parts of a pattern that are spelled by their numbers."""
    kind, values = spelled
    if kind is Pattern:
        return [pattern]
    if isinstance(pattern, (And, Or)):
        pairs = zip(pattern.parts, values[0][1], strict=True)
        return [owner for part, text in pairs for owner in _numbered_in(part, text)]
    return _numbered_in(pattern.part, values[0]) if isinstance(pattern, Not) else []


#: By the spelling of a pattern, and of one with tensors by its identity: equal tensors may come to
#: differ.
_PLANS: dict[tuple[Any, str, Sizes], Direct] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _plan_of_object(address: int, device: str, sizes: Sizes) -> Direct:
    key = (address, device, sizes)
    if key not in _PLANS:
        pattern = _at(address)
        _PLANS[key] = plan_direct(pattern, device, sizes)
        weakref.finalize(pattern, _PLANS.pop, key, None)
    return _PLANS[key]


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


def plan_direct(
    pattern: Pattern, device: str, sizes: Sizes, owner: Pattern | None = None
) -> Direct:
    """What runs for a pattern on a type of device, at about these sizes.

    Args:
        pattern: who may attend to whom.
        device: a type of device.
        sizes: what views are chosen for.
        owner: as long as it lives, graphs can find the tables; default the pattern.
    """
    owner = pattern if owner is None else owner
    if selects(pattern):
        static, selected = plan_selected(pattern, owner, device, sizes)
        return *static, False, selected
    bound = pattern.bound()
    expr = bound.expr
    causal = expr.predicate == sympy.Le(KV, Q)
    if causal or expr.predicate == sympy.true:
        return "", "", (), causal, None
    return *planned(bound, owner, device, sizes), False, None

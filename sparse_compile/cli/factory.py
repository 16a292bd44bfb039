"""``pkg.module:factory`` on the command line: import it, call it, and say clearly what is wrong."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from sparse_compile.errors import BadFactory

_RETURNS = "Return a model, (model, args) or (model, args, kwargs)."


@dataclass(frozen=True)
class Call:
    """A model and what it is called with."""

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def load(text: str) -> Call:
    """What the factory named by ``text`` returns; the current directory can be imported from.

    Raises:
        BadFactory: ``text`` does not name a function without required arguments that returns a
            model, (model, args) or (model, args, kwargs), or the model cannot be called so.
    """
    factory = _find(text)
    wrong = _why_not_called(factory)
    if wrong is not None:
        raise BadFactory(
            f"sparse_compile: {text} cannot be called without arguments: {wrong}. "
            "Write a function that needs none, or give its arguments defaults."
        ) from wrong
    try:
        value = factory()
    except Exception as error:
        module, name = text.split(":")
        raise BadFactory(
            f"sparse_compile: {text}() raised {type(error).__name__}: {error}. For the traceback: "
            f'python -c "import {module} as m; m.{name}()"'
        ) from error
    call = _as_call(text, value)
    forward = getattr(call.model, "forward", call.model)
    wrong = _why_not_called(forward, *call.args, **call.kwargs)
    if wrong is not None:
        raise BadFactory(
            f"sparse_compile: the model that {text}() returned cannot be called with "
            f"the returned arguments: {wrong}. Return (model, (x,)) or (model, (), {{'x': x}})."
        ) from wrong
    return call


def _find(text: str) -> Callable[..., Any]:
    module_name, colon, name = text.partition(":")
    if not (module_name and colon and name):
        example = f"{text.strip(':') or 'package.module'}:build"
        raise BadFactory(
            f"sparse_compile: {text!r} names no factory. Write module:function, as in {example}"
        )
    module = _import(text, module_name)
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, dir(module), n=1)
        functions = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        listed = ", ".join(sorted(functions))
        hint = f"Its functions: {listed}." if listed else "It has no functions."
        if near:
            hint = f"Did you mean {module_name}:{near[0]}?"
        raise BadFactory(f"sparse_compile: module {module_name!r} has no {name!r}. {hint}")
    factory = getattr(module, name)
    if not callable(factory):
        raise BadFactory(
            f"sparse_compile: {text} is {_a(factory)}, not a function. Write a function "
            f"without arguments. {_RETURNS}"
        )
    found: Callable[..., Any] = factory
    return found


def _import(text: str, name: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise BadFactory(
                f"sparse_compile: no module named {missing!r}, in {text!r}. Write the dotted "
                "name of a module that is installed or lies in the current directory, without .py"
            ) from error
        raise BadFactory(
            f"sparse_compile: importing {name!r} raised {type(error).__name__}: {error}. "
            f'For the traceback: python -c "import {name}"'
        ) from error


def _why_not_called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> TypeError | None:
    """Why a function cannot be called so; None if it can."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        return error
    except ValueError:  # a builtin without a signature: calling it will tell
        pass
    return None


def _as_call(text: str, value: Any) -> Call:
    if not isinstance(value, tuple):
        value = (value,)
    if not 1 <= len(value) <= 3 or not callable(value[0]):
        shown = f"({', '.join(_a(v) for v in value)})" if len(value) != 1 else _a(value[0])
        raise BadFactory(f"sparse_compile: {text}() returned {shown}, not a model. {_RETURNS}")
    model: Callable[..., Any] = value[0]
    args: Any = value[1] if len(value) > 1 else ()
    kwargs: Any = value[2] if len(value) > 2 else {}
    if not isinstance(args, (tuple, list)):
        raise BadFactory(
            f"sparse_compile: the args that {text}() returned are {_a(args)}. "
            "Return a tuple of positional arguments: (model, (x,)) or (model, (), {'x': x})."
        )
    if not isinstance(kwargs, Mapping):
        raise BadFactory(
            f"sparse_compile: the kwargs that {text}() returned are {_a(kwargs)}. "
            "Return a dict of keyword arguments: (model, (x,), {'mask': mask})."
        )
    return Call(model, tuple(args), dict(kwargs))


def _a(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"

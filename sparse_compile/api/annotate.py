"""mask: attach a pattern to a module class, a module, a method or a function.

The wrapper that the decorator puts around the code does nothing but name the annotation in the
metadata that torch.compile keeps for every operation; the innermost name wins by itself.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import nn
from torch.fx import traceback

from sparse_compile.errors import PatternMisuse
from sparse_compile.patterns.base import Pattern
from sparse_compile.selection.split import selects, split
from sparse_compile.sites.annotation import META_KEY, Annotation

T = TypeVar("T")

#: What torch.compile has Python call for new frames: set while Python runs a frame of a compiled
#: program that was not captured. ``tests/project/test_fences.py`` says what is relied upon.
_frame_callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)

#: Set on our wrappers: the annotation of the code inside, which also keeps it alive.
_MARK = "__sparse_compile_annotation__"


@overload
def mask(pattern: Pattern, /, *, promise: bool = False) -> Callable[[T], T]: ...
@overload
def mask(target: T, pattern: Pattern, /, *, promise: bool = False) -> T: ...
def mask(*args: Any, promise: bool = False) -> Any:
    """Say which pairs the attention in a piece of code may attend to.

    Written ``@mask(pattern)`` over a module class, a method or a function, or called as
    ``mask(model.layers[3].attn, pattern)`` for one module. Where annotations nest, the innermost
    applies; one on a module replaces the one on its class. Under any backend but this library's,
    and without torch.compile, the code runs as it was.

    Args:
        *args: the pattern, or what to annotate and the pattern. One that selects keys by content is
            an approximation of what the code computes, and reported as one.
        promise: False *restricts*: the pattern is ANDed with the mask that the code itself has.
            True *promises*: the mask tensors that the code passes are this pattern, so they are
            not read. ``options={"check_promises": True}`` checks that in every call.

    Returns:
        the decorator, or what was annotated.

    Raises:
        PatternMisuse, BadPattern: the pattern is none, or selects in a way that cannot be run; or
            the target is nothing that can be annotated.
    """
    if len(args) not in (1, 2):
        raise PatternMisuse(
            f"sparse_compile: mask() takes a pattern, or a target and a pattern, got {len(args)} "
            "arguments. Write @mask(pattern), or mask(module, pattern)."
        )
    pattern = args[-1]
    if not isinstance(pattern, Pattern):
        raise PatternMisuse(_no_pattern(args))
    if not isinstance(promise, bool):
        raise PatternMisuse(f"sparse_compile: mask(promise={promise!r}): write True or False.")
    if selects(pattern):
        if promise:
            raise PatternMisuse(
                f"sparse_compile: mask({pattern!r}, promise=True): what is selected is known when "
                "q and k are, so no mask tensor can be promised to be it. Remove promise=True."
            )
        split(pattern)  # raises what there is to say against it
    if len(args) == 1:
        return functools.partial(_annotate, pattern=pattern, promise=promise)
    return _annotate(args[0], pattern, promise)


def _no_pattern(args: tuple[Any, ...]) -> str:
    if isinstance(args[0], Pattern):
        return (
            "sparse_compile: mask() got the pattern first. Write mask(target, pattern), or "
            f"mask({args[0]!r})(target)."
        )
    return (
        f"sparse_compile: mask() got {_shown(args[-1])}, which is no pattern. Write one of "
        "sparse_compile.patterns, as in mask(patterns.SlidingWindow(512))."
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"


def _annotate(target: Any, pattern: Pattern, promise: bool) -> Any:
    if isinstance(target, nn.Module):
        return _annotate_module(target, pattern, promise)
    if inspect.isclass(target) and issubclass(target, nn.Module):
        return _annotate_class(target, pattern, promise)
    if isinstance(target, (staticmethod, classmethod)):
        return type(target)(_wrap(target.__func__, _of(target.__func__, pattern, promise)))
    if inspect.isfunction(target) or inspect.ismethod(target):
        return _wrap(target, _of(target, pattern, promise))
    raise PatternMisuse(
        f"sparse_compile: mask() cannot annotate {_shown(target)}. Annotate a class of nn.Module, "
        "a module, a method or a function."
    )


def _of(function: Callable[..., Any], pattern: Pattern, promise: bool) -> Annotation:
    name = function.__qualname__.split("<locals>.")[-1]
    return Annotation(pattern, promise, f"{'method' if '.' in name else 'function'} {name}")


def _annotate_class(cls: type[nn.Module], pattern: Pattern, promise: bool) -> type[nn.Module]:
    forward = _forward_of(cls)
    annotation = Annotation(pattern, promise, f"class {cls.__name__}")
    cls.forward = _wrap_forward(forward, annotation)
    return cls


def _annotate_module(module: Any, pattern: Pattern, promise: bool) -> Any:
    original = getattr(module, "_orig_mod", module)  # what torch.compile(module) holds
    annotation = Annotation(pattern, promise, f"class {type(original).__name__}", id(original))
    # A bound method, so that a deep copy of the module is annotated and runs its own forward.
    original.forward = types.MethodType(
        _wrap_forward(_plain_forward(original), annotation), original
    )
    return module


def _plain_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module as a function, without annotations, which would be inner ones."""
    own = module.__dict__.get("forward")
    if own is None:
        return _unwrapped(_forward_of(type(module)))
    if isinstance(own, types.MethodType) and own.__self__ is module:
        return _unwrapped(own.__func__)

    @functools.wraps(own)
    def forward(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return forward


def _forward_of(cls: type[nn.Module]) -> Callable[..., Any]:
    forward: Callable[..., Any] = cls.forward
    if forward is nn.Module.forward:
        raise PatternMisuse(
            f"sparse_compile: mask() cannot annotate {cls.__name__}, which has no forward. "
            "Annotate the method that calls the attention."
        )
    return forward


def _unwrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    while getattr(forward, _MARK, None) is not None:
        forward = forward.__wrapped__  # type: ignore[attr-defined]
    return forward


def _wrap(function: Callable[..., Any], annotation: Annotation) -> Callable[..., Any]:
    named = {META_KEY: annotation.key}

    @functools.wraps(function)
    def annotated(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling() and callable(_frame_callback()):
            _warn_that_lost(annotation)
        with traceback.annotate(named):
            return function(*args, **kwargs)

    setattr(annotated, _MARK, annotation)
    return annotated


def _wrap_forward(forward: Callable[..., Any], annotation: Annotation) -> Callable[..., Any]:
    inner = _wrap(forward, annotation)

    @functools.wraps(forward)
    def annotated(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Its own frame, since torch.compile names a model after the argument that holds it.
        return inner(self, *args, **kwargs)

    setattr(annotated, _MARK, annotation)
    return annotated


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _warn_that_lost(annotation: Annotation) -> None:
    """Say that torch.compile gave up on tracing this code and captures it piece by piece.

    The pieces are captured without the wrapper around them. Nothing is lost under other backends.
    """
    if "sparse_compile.backend" in sys.modules:
        warnings.warn(
            f"sparse_compile: a graph break inside {annotation.target} separates its attention "
            f"from the annotation {annotation.pattern!r}, which is not applied. Remove the break "
            "(fullgraph=True shows where it is) or annotate the method after it.",
            stacklevel=3,
        )

"""The fence around symbolic sizes that are only known at run time.

``torch.library.get_ctx().new_dynamic_size()`` is the public way to get one, but outside of
``fullgraph=True`` Dynamo forbids it: there, an operator in the *user's* program whose output size
depends on data must break the graph. The operators here stand in a graph that was captured already,
so the prohibition does not concern them. ``tests/project/test_fences.py`` says what is relied upon.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def fresh_size() -> torch.SymInt:
    """A new symbolic size >= 0; to be called inside a fake implementation."""
    context = torch.library.get_ctx()
    shape_env = context._shape_env
    if shape_env is None or shape_env.allow_dynamic_output_shape_ops:
        return context.new_dynamic_size()
    size: torch.SymInt = shape_env.create_unbacked_symint()
    torch._check(size >= 0)  # type: ignore[no-untyped-call]
    return size


def told_apart() -> torch.Tensor | None:
    """An argument that no two calls share which are traced, and none elsewhere.

    AOTAutograd merges calls with equal arguments, and forgets that nodes below know the sizes of
    the one that goes by its own symbols. It never merges ``aten.empty``.
    """
    return None if get_proxy_mode() is None else torch.empty(0)


@contextlib.contextmanager
def unbound_sizes(fake_mode: Any) -> Iterator[None]:
    """Let operators on fake tensors of a mode make sizes that no node of a graph defines."""
    shape_env = getattr(fake_mode, "shape_env", None)
    if shape_env is None:
        yield
        return
    with shape_env.ignore_fresh_unbacked_symbols():
        yield

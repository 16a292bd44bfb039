"""Operators without kernels: one node of a captured graph, made of others for other backends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from sparse_compile.ops.fresh_size import unbound_sizes

_NAMESPACE = "sparse_compile"


def defined(schema: str) -> Any:
    """The operator of a schema, as nodes of a graph call it."""
    name, bracket, rest = schema.partition("(")
    torch.library.define(f"{_NAMESPACE}::{name}", bracket + rest)
    return getattr(torch.ops.sparse_compile, name).default


def composed_of(operator: Any, attend: Callable[..., Any]) -> None:
    """Say what an operator is made of.

    Args:
        operator: as :func:`defined` returns it; its first arguments are q, k and v.
        attend: takes these as a tuple, and the rest.
    """

    def composed(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        # While Dynamo only asks for the shapes of results, sizes inside belong to no node.
        asked = get_proxy_mode() is None
        with unbound_sizes(getattr(q, "fake_mode", None)) if asked else contextlib.nullcontext():
            return attend((q, k, v), *rest)

    torch.library.impl(operator.name(), "CompositeImplicitAutograd", composed)

"""Capture the Dynamo graphs of a function or module with a recording backend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule


@dataclass(frozen=True)
class Captured:
    """One compiled graph, the inputs of its first run, and the grad mode of that run."""

    gm: GraphModule
    inputs: tuple[Any, ...]
    grad: bool


def capture(
    fn: Callable[..., Any],
    *args: Any,
    grad: bool = False,
    dynamic: bool | None = False,
    autocast: torch.dtype | None = None,
    fullgraph: bool = True,
    **kwargs: Any,
) -> tuple[Captured, ...]:
    """The Dynamo graphs of ``fn(*args, **kwargs)``, in the order in which they are compiled."""
    graphs: list[Captured] = []
    ran: set[int] = set()

    def record(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        slot = len(graphs)
        graphs.append(Captured(gm, tuple(inputs), torch.is_grad_enabled()))

        def run(*values: Any) -> Any:
            # While compiling, sizes are symbols; only the run has numbers.
            if slot not in ran:
                ran.add(slot)
                held = tuple(v.detach().clone() if isinstance(v, Tensor) else v for v in values)
                graphs[slot] = Captured(gm, held, torch.is_grad_enabled())
            return gm(*values)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=record, dynamic=dynamic, fullgraph=fullgraph)
    ambient = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    with torch.set_grad_enabled(grad), ambient:
        compiled(*args, **kwargs)
    return tuple(graphs)


def capture_one(fn: Callable[..., Any], *args: Any, **options: Any) -> Captured:
    """The only graph of ``fn``; an error if there are several."""
    (captured,) = capture(fn, *args, **options)
    return captured

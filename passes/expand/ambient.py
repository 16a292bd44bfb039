"""What a graph switches on and off around a node: autocast, gradients, transforms of functions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node


@dataclass(frozen=True)
class Ambient:
    """What a graph has switched on or off so far.

    Attributes:
        autocasts: the nodes that entered an autocast that is not left yet, outermost first.
        grad: whether gradients are recorded; None: as outside of the graph.
        transforms: how many of ``torch.func``, such as vmap, a node is inside of.
    """

    autocasts: tuple[Node, ...] = ()
    grad: bool | None = None
    transforms: int = 0

    def after(self, node: Node) -> Ambient:
        """What is switched on once a node has run."""
        name = getattr(node.target, "__name__", "")
        if name == "_enter_autocast":
            return replace(self, autocasts=(*self.autocasts, node))
        if name == "_exit_autocast":
            left = tuple(entered for entered in self.autocasts if entered is not node.args[0])
            return replace(self, autocasts=left)
        if name == "_set_grad_enabled" and isinstance(node.args[0], bool):
            return replace(self, grad=node.args[0])
        if name.endswith("_nesting"):
            step = 1 if "increment" in name else -1
            return replace(self, transforms=self.transforms + step)
        return self

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """As it is at the node."""
        with contextlib.ExitStack() as stack:
            for entered in self.autocasts:
                device, dtype, enabled = _arguments(entered)
                stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
            if self.grad is not None:
                stack.enter_context(torch.set_grad_enabled(self.grad))
            yield


def _arguments(entered: Node) -> tuple[str, torch.dtype, bool]:
    arguments: Any = entered.args
    device, dtype, enabled, *_ = arguments
    return device, dtype, enabled

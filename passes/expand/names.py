"""What nodes are called."""

from __future__ import annotations

import torch
from torch.fx import Node


def name_of(node: Node) -> str:
    """The name of the function, method or operator that a node calls; for others of no use."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.partition("::")[2])
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))

"""Where a node of a captured graph stands in the user's code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch.fx import Node


def place(node: Node | None, where: Sequence[str]) -> str:
    """Where a node stands: its module, then its source line."""
    paths = [path for path, _ in modules_around(node).values()]
    module = readable_path(paths[-1]) if paths else ""
    return ", ".join(part for part in (module, where[-1] if where else "") if part) or "unknown"


def readable_path(path: str) -> str:
    """Dynamo's path to a module as users write it."""
    # Dynamo's path starts at a local or global variable: L['self'].layers.0
    # and goes through the wrapper that annotates a module.
    path = path.replace(".forward.__self__", "")
    return re.sub(r"^[LG]\['(?:(?:self|fn)'\]\.?|(\w+)'\])", r"\1", path)


def modules_around(node: Node | None) -> dict[str, Any]:
    """The modules around a node, outermost first."""
    return ({} if node is None else node.meta.get("nn_module_stack")) or {}

"""Where an attention stands in the user's model, in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from sparse_compile.sites.annotation import Annotation


def place(node: Node | None, where: Sequence[str]) -> str:
    """Where a node stands: its module, then its source line."""
    paths = [path for path, _ in _modules(node).values()]
    module = _readable_path(paths[-1]) if paths else ""
    return ", ".join(part for part in (module, where[-1] if where else "") if part) or "unknown"


def _readable_path(path: str) -> str:
    # Dynamo's path starts at a local or global variable: L['self'].layers.0
    # and goes through the wrapper that annotates a module.
    path = path.replace(".forward.__self__", "")
    return re.sub(r"^[LG]\['(?:(?:self|fn)'\]\.?|(\w+)'\])", r"\1", path)


def _modules(node: Node | None) -> dict[str, Any]:
    """The modules around a node, outermost first."""
    return ({} if node is None else node.meta.get("nn_module_stack")) or {}


def said_of(annotation: Annotation | None, node: Node | None) -> str | None:
    """What the user's annotation says of a node, and on what it is; None without one."""
    if annotation is None:
        return None
    stack = _modules(node)
    keys = [key for key in stack if key.split("@")[0] == str(annotation.module)]
    return annotation.shown(_readable_path(stack[keys[-1]][0]) if keys else "")

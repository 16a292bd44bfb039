"""Where in the user's code a node comes from."""

from __future__ import annotations

import os
import re

import torch
from torch.fx import Node

from sparse_compile import errors

_FRAME = re.compile(r'File "(?P<path>[^"]+)", line (?P<line>\d+), in (?P<function>.+)')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.join(os.path.dirname(errors.__file__), "api") + os.sep
_KEPT = 3


def where(node: Node) -> tuple[str, ...]:
    """The last three frames outside torch and our own API, innermost last.

    As in ``("model.py:41 in forward", ...)``.
    """
    frames = _FRAME.finditer(node.meta.get("stack_trace") or "")
    lines = [
        f"{os.path.basename(frame['path'])}:{frame['line']} in {frame['function'].strip()}"
        for frame in frames
        if not frame["path"].startswith((_TORCH, _OURS))
    ]
    return tuple(lines[-_KEPT:])

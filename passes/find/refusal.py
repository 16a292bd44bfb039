"""What is said of a node that is no attention that can be taken: why, and where it comes from."""

from __future__ import annotations

import os
import re

import torch
from torch.fx import Node

from sparse_compile import errors
from sparse_compile.sites.site import Rejection

_FRAME = re.compile(r'File "(?P<path>[^"]+)", line (?P<line>\d+), in (?P<function>.+)')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.join(os.path.dirname(errors.__file__), "api") + os.sep
_KEPT = 3


class Refusal(Exception):
    """The subgraph is not an attention that may be rewritten, and why, in the user's words.

    It carries the reason out of a match and becomes a Rejection, never an error.
    """

    def __init__(self, reason: str, hint: str = "") -> None:
        """Both are plain sentences; ``hint`` says what to write instead."""
        super().__init__(reason)
        self.reason = reason
        self.hint = hint

    def of(self, node: Node) -> Rejection:
        """What it says of the node that looked like attention."""
        return Rejection(self.reason, self.hint, where(node), node)


def where(node: Node) -> tuple[str, ...]:
    """Where in the user's code a node comes from: three frames at most, innermost last.

    As in ``("model.py:41 in forward", ...)``, without torch's own and those of our API.
    """
    frames = _FRAME.finditer(node.meta.get("stack_trace") or "")
    lines = [
        f"{os.path.basename(frame['path'])}:{frame['line']} in {frame['function'].strip()}"
        for frame in frames
        if not frame["path"].startswith((_TORCH, _OURS))
    ]
    return tuple(lines[-_KEPT:])

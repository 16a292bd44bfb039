"""The exception that carries a reason out of a match; it becomes a Rejection, never an error."""

from __future__ import annotations

from torch.fx import Node

from sparse_compile.passes.find.provenance import where
from sparse_compile.sites.site import Rejection


class Refusal(Exception):
    """The subgraph is not an attention that may be rewritten, and why, in the user's words."""

    def __init__(self, reason: str, hint: str = "") -> None:
        """Both are plain sentences; ``hint`` says what to write instead."""
        super().__init__(reason)
        self.reason = reason
        self.hint = hint

    def of(self, node: Node) -> Rejection:
        """What it says of the node that looked like attention."""
        return Rejection(self.reason, self.hint, where(node), node)

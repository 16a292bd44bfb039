"""Shadow: what an opaque call computes, written out in a graph beside the call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from sparse_compile.sites.site import Refused


@dataclass(frozen=True)
class Shadow:
    """Nodes that compute the same as a call which hides its attention; nothing reads them yet.

    Where an attention among them is rewritten they take the place of the call, and are erased
    elsewhere.

    Attributes:
        call: the call.
        nodes: of the shadow, in graph order; they stand before the call.
        outputs: for each node that holds a result of the call, the one that computes the same.
    """

    call: Node
    nodes: tuple[Node, ...]
    outputs: tuple[tuple[Node, Node], ...]


@dataclass(frozen=True)
class Expanded:
    """What became of the opaque calls of a graph and of its bodies.

    Attributes:
        shadows: of the calls that are written out.
        refusals: why the other calls are not.
    """

    shadows: Mapping[Node, Shadow] = field(default_factory=dict)
    refusals: Mapping[Node, Refused] = field(default_factory=dict)

    def shadow_of(self, node: Node | None) -> Shadow | None:
        """The shadow that a node stands in, or whose call it is."""
        mine = (s for s in self.shadows.values() if node is s.call or node in s.nodes)
        return next(mine, None)

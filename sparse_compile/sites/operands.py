"""What an attention reads: tensors of a graph, and what their axes mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class Scope:
    """The graph a node lives in: the captured graph, or the body of a higher-order call in it.

    Attributes:
        gm: the graph.
        parent: the scope of the call, None for the captured graph itself.
        call: the node in ``parent`` that calls ``gm``, such as an activation checkpoint.
        inputs: for each placeholder of ``gm`` in order, the node of ``parent`` that feeds it.
    """

    gm: GraphModule
    parent: Scope | None = None
    call: Node | None = None
    inputs: tuple[Node, ...] = ()

    @property
    def feeds(self) -> dict[Node, Node]:
        """The node of ``parent`` that each placeholder stands for, in order.

        A site that was rewritten may have handed the body more, which is in neither.
        """
        return dict(zip(self.gm.graph.find_nodes(op="placeholder"), self.inputs, strict=False))


@dataclass(frozen=True)
class Operand:
    """A tensor node and the meaning of its axes, in order.

    ``axes`` are among ``b`` (batch), ``h`` (heads: query heads for q and out, key heads for k and
    v), ``n`` (tokens) and ``d`` (features): ``("b", "n", "h", "d")`` for a [B, N, H, D] tensor.
    An absent ``b`` or ``h`` means size one. Where batch or heads are two axes, ``b1`` and ``h1``
    are the outer ones, ``b2`` and ``h2`` the inner ones; where they are one axis, it is ``bh``, and
    ``split`` says how many there are of both.
    """

    node: Node
    axes: tuple[str, ...] = ("b", "h", "n", "d")
    split: tuple[Any, Any] = (1, 1)

    def renamed(self, names: Mapping[str, str]) -> Operand:
        """The same tensor, its axes called otherwise."""
        return Operand(self.node, tuple(names[axis] for axis in self.axes))


@dataclass(frozen=True)
class MaskOperand:
    """One tensor applied to the scores: a mask, a bias or both.

    Attributes:
        node: the tensor; broadcasts against the scores from the right.
        role: ``"keep"``: bool, True attends and False gets ``fill``;
            ``"drop"``: bool, True gets ``fill``; ``"add"``: numbers, added to the scores;
            ``"factor"``: numbers, which scores are multiplied with, or divided by.
        fill: the score of masked entries for ``keep`` and ``drop``; unused for others. A Node when
            the program passes a 0-dim tensor.
        times: what is added is multiplied with it.
        then: what happens to the scores afterwards, in order: what later operands have, too, comes
            last.
        curved: whether the scores go through a curve afterwards, so that no mask may be in it.
        axes: of the scores that it is applied to, as of an :class:`Operand`; empty: as the site
            says.
        sizes: of these.
    """

    node: Node
    role: str
    fill: float | Node = float("-inf")
    times: float = 1.0
    then: tuple[Change, ...] = ()
    curved: bool = False
    axes: tuple[str, ...] = ()
    sizes: tuple[Any, ...] = field(default=(), compare=False)  # may be symbols: no hash

    def changed(self, value: float) -> float:
        """What becomes of a fill, or of a number that is added."""
        value *= self.times
        for change in self.then:
            value = change(value)
        return value


@dataclass(frozen=True)
class Change:
    """What a program does to scores after it masked them, or added to them.

    Attributes:
        times: they are multiplied with it.
        rounded: to this dtype; None: they are not.
        least: they are at least this.
        shares: whether of two equal ones, the score and the least, each gets half of the gradient.
        centred: whether the maximum of each row is subtracted from it before. Where a row has
            scores that are not masked, masked ones are what they were.
    """

    times: float = 1.0
    rounded: torch.dtype | None = None
    least: float = float("-inf")
    shares: bool = False
    centred: bool = False

    def __call__(self, value: float) -> float:
        """What becomes of a number, in a row that has others."""
        value = max(value * self.times, self.least) if self.times != 1.0 else max(value, self.least)
        if self.rounded is not None:
            value = float(torch.tensor(value, dtype=torch.float64).to(self.rounded))
        return value

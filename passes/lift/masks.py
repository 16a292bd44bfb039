"""What an attention asks of lifting: its masks, and the part of the graph that computes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from sparse_compile.expr import KV, B, H, Q
from sparse_compile.passes.graph_edit import dimension, example_value, first_reader
from sparse_compile.passes.lift.sizes import size_expr
from sparse_compile.passes.lift.slice import Slice, Slicer, Wanted
from sparse_compile.sites.site import AttentionSite

Lengths = Mapping[sympy.Symbol, sympy.Expr]

#: The coordinates of scores, by the names of their axes.
COORDINATES = {"b": B, "h": H, "q": Q, "kv": KV}


@dataclass(frozen=True)
class SiteMasks:
    """The masks of an attention; equal ones are made by the same nodes.

    Attributes:
        site: the attention.
        wanted: the masks, then the fills that are nodes, each with the first node that reads it.
        part: the slice that computes these.
        lengths: number of batch entries, heads, queries and keys, in torch's size symbols.
    """

    site: AttentionSite
    wanted: tuple[Wanted, ...]
    part: Slice
    lengths: Lengths

    @staticmethod
    def of(site: AttentionSite, slicer: Slicer) -> SiteMasks:
        """The masks of a site that has some.

        Raises:
            Refused: their computation cannot be cut out.
        """
        nodes = [mask.node for mask in site.masks]
        nodes += [mask.fill for mask in site.masks if isinstance(mask.fill, Node)]
        wanted = tuple(Wanted(node, first_reader(site, node)) for node in nodes)
        return SiteMasks(site, wanted, slicer(wanted, site.scope), _lengths(site))

    def traced(self) -> SiteMasks:
        """The same after tracing, which may have fixed a size.

        As when a slice is compared with the length that it is cut from.
        """
        return replace(self, lengths=_lengths(self.site))

    @property
    def dtype(self) -> torch.dtype:
        """Of the scores when they are masked."""
        value = self._scores
        if self.site.kind == "eager" and value is not None and value.is_floating_point():
            return value.dtype
        dtype: torch.dtype = example_value(self.site.q.node).dtype
        return dtype

    @property
    def need_gradients(self) -> bool:
        """Whether autograd follows the scores when they are masked."""
        return self._scores is None or self._scores.requires_grad

    @property
    def _scores(self) -> torch.Tensor | None:
        value = self.wanted[0].reader.meta.get("example_value")
        return value if isinstance(value, torch.Tensor) else None

    @property
    def key(self) -> Any:
        """What determines their meaning."""
        site = self.site
        roles = tuple((mask.role, mask.fill) for mask in site.masks)
        scores = (site.score is None, site.sinks is None, self.need_gradients)
        ranked = site.ranked is None
        plan = (site.kind, site.causal, site.score_axes, self.dtype, ranked, scores)
        return (self.part.nodes, self.part.outputs, roles, plan, tuple(self.lengths.items()))


def _lengths(site: AttentionSite) -> Lengths:
    """Sizes of the coordinates, preferring a mask's own symbols: layers may differ in theirs."""
    named = {"b": (site.q, "b"), "h": (site.q, "h"), "q": (site.q, "n"), "kv": (site.k, "n")}
    sizes = {name: size_expr(dimension(*axis)) for name, axis in named.items()}
    for mask in reversed(site.masks):
        shape = example_value(mask.node).shape
        for axis, size in zip(reversed(site.score_axes), reversed(shape), strict=False):
            if size_expr(size) != 1:
                sizes[axis] = size_expr(size)
    return {COORDINATES[axis]: size for axis, size in sizes.items()}

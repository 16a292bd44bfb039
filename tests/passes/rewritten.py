"""Compile with the rewriting passes and AOTAutograd, and look at the graphs that would run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

from sparse_compile.options import Options
from sparse_compile.passes import pipeline
from sparse_compile.sites.plan import Decision, Trace


@dataclass
class Rewritten:
    """What became of a program.

    Attributes:
        traces: of every attention, in order.
        graphs: of ATen operators, as Inductor would get them: forwards and backwards.
        rewrite: whether the passes run at all.
    """

    rewrite: bool = True
    traces: list[Trace] = field(default_factory=list)
    graphs: list[GraphModule] = field(default_factory=list)

    @property
    def decisions(self) -> list[Decision]:
        """What became of each."""
        return [trace.decided for trace in self.traces]

    def compiled(self, function: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
        """``function`` compiled by the passes; everything else runs as it is."""
        torch._dynamo.reset()
        return torch.compile(function, backend=self._backend, dynamic=dynamic)

    def _backend(self, gm: GraphModule, inputs: Sequence[Any]) -> Any:
        if self.rewrite:
            self.traces += pipeline.run(gm, inputs, Options(decide="sparse"))
        return aot_autograd(fw_compiler=self._keep)(gm, inputs)

    def _keep(self, gm: GraphModule, inputs: Sequence[Any]) -> Any:
        self.graphs.append(gm)
        return make_boxed_func(gm.forward)

    def squares(self, n: int) -> list[str]:
        """The nodes whose tensors have two axes of size ``n``, or as many numbers.

        Sizes that are known at run time only count as different ones.
        """
        return [
            f"{node.name} {sizes}"
            for gm in self.graphs
            for node in gm.graph.nodes
            for value in _tensors(node.meta.get("val"))
            for sizes in [[size for size in value.shape if isinstance(size, int)]]
            if sizes.count(n) > 1 or (math.prod(sizes) and math.prod(sizes) % (n * n) == 0)
        ]

    def targets(self) -> list[str]:
        """The names of the operators, in order."""
        return [str(node.target) for gm in self.graphs for node in gm.graph.nodes]


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in values if isinstance(item, Tensor)]


def trained(call: Callable[..., Tensor], model: nn.Module, *args: Any, **kwargs: Any) -> list[Any]:
    """The output of a model, and the gradients of its parameters under a fixed loss."""
    model.zero_grad(set_to_none=True)
    output = call(*args, **kwargs)
    output = getattr(output, "logits", output)
    # Drawn on the CPU, also where another device is the default.
    generator = torch.Generator("cpu").manual_seed(7)
    weights = torch.randn(output.shape, generator=generator, device="cpu")
    (output * weights.to(output.device)).sum().backward()
    return [output.detach(), *(p.grad for p in model.parameters())]


def assert_same(found: Sequence[Tensor | None], truth: Sequence[Tensor | None]) -> None:
    """Relative error of at most 1e-5 for each tensor."""
    for ours, theirs in zip(found, truth, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours.isnan(), theirs.isnan())
            difference = (ours - theirs).nan_to_num().norm()
            assert difference <= 1e-5 * theirs.nan_to_num().norm() + 1e-12

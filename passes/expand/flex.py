"""What ``flex_attention`` computes, in terms of SDPA or of a softmax."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from sparse_compile.passes.expand.blocks import check_blocks
from sparse_compile.passes.expand.inputs import Inputs
from sparse_compile.passes.expand.recipe import Recipe
from sparse_compile.passes.expand.spread import Spread
from sparse_compile.passes.graph_edit import example_value, fake_mode_of
from sparse_compile.sites.site import Refused


@dataclass(frozen=True)
class FlexCall:
    """A call of ``flex_attention``.

    Attributes:
        q, k, v: its operands.
        score_mod, mask_mod: what is applied to each score, and says whether it is kept.
        blocks: the other items of its block mask.
        scale: of the products.
        score_given, mask_given: the tensors that ``score_mod`` and ``mask_mod`` read.
    """

    q: Node
    k: Node
    v: Node
    score_mod: Spread
    mask_mod: Spread
    blocks: tuple[Any, ...]
    scale: Any
    score_given: tuple[Node, ...]
    mask_given: tuple[Node, ...]

    @staticmethod
    def of(call: Node) -> FlexCall:
        """Read a node that calls it.

        Raises:
            Refused: a function that it is given is no pointwise one.
        """
        arguments: Any = call.args
        q, k, v, score_mod, blocks, scale, _, score_given, mask_given = arguments
        mode = fake_mode_of(call.all_input_nodes)
        with mode:
            score = torch.empty((), device=example_value(q).device)
            places = [torch.empty((), dtype=torch.int64, device=score.device) for _ in range(4)]
            score_program = _spread(call, score_mod, [score, *places], score_given)
            mask_program = _spread(call, blocks[-1], places, mask_given)
        programs = score_program, mask_program
        return FlexCall(q, k, v, *programs, blocks[:-1], scale, score_given, mask_given)


def flexible(call: Node, read: Collection[int], inputs: Inputs) -> Recipe:
    """A call of the ``flex_attention`` operator.

    Raises:
        Refused: more than its output is read, or a function that it is given is not pointwise.
    """
    if any(read):
        raise Refused("its log-sum-exp or its largest scores are read", "use the output only")
    given = FlexCall.of(call)
    check_blocks((given.q, given.k), given.blocks, given.mask_mod, given.mask_given, inputs)
    function = _attention(given.score_mod, given.mask_mod)
    operands = given.q, given.k, given.v, given.scale
    return Recipe(function, (*operands, given.score_given, given.mask_given))


def _spread(call: Node, body: Node, numbers: list[Tensor], given: tuple[Node, ...]) -> Spread:
    owner = call.graph.owning_module
    graph = operator.attrgetter(str(body.target))(owner)
    assert isinstance(graph, GraphModule)
    return Spread.of(graph, numbers, [example_value(node) for node in given])


def _attention(score_mod: Spread, mask_mod: Spread) -> Callable[..., tuple[Tensor]]:
    """A function of the operands, the scale, and what both read."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: Any,
        score_given: tuple[Tensor, ...],
        mask_given: tuple[Tensor, ...],
    ) -> tuple[Tensor]:
        batch, heads, n_q, _ = q.shape
        n_kv = k.shape[2]
        if k.shape[0] != batch:
            k, v = (x.expand(batch, -1, -1, -1) for x in (k, v))
        places = [
            torch.arange(size, device=q.device).view([-1 if at == axis else 1 for at in range(4)])
            for axis, size in enumerate((batch, heads, n_q, n_kv))
        ]
        keep = mask_mod(*places, *mask_given)
        keep = keep if keep.dim() else keep.expand(n_q, n_kv)
        grouped = k.shape[1] != heads
        if score_mod.is_identity:
            given: dict[str, Any] = {"enable_gqa": True} if grouped else {}
            return (F.scaled_dot_product_attention(q, k, v, keep, scale=scale, **given),)
        if grouped:
            k, v = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
        scores = torch.matmul(_single(q), _single(k).transpose(-2, -1)) * scale
        scores = score_mod(scores, *places, *score_given)
        weights = torch.softmax(torch.where(keep, scores, -math.inf), -1)
        # Of a query without any key they are NaN, and are made 0.
        weights = weights.nan_to_num(0.0)
        weights = weights if weights.dtype == q.dtype else weights.to(q.dtype)
        return (torch.matmul(weights, v),)

    return attention


def _single(x: Tensor) -> Tensor:
    """In single precision, in which scores are computed."""
    return x if x.dtype == torch.float32 else x.float()

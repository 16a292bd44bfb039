"""Launch the generated kernels for attention to blocks: forward and backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.triton.blocks import arguments
from sparse_compile.codegen.triton.blocks.passes import Pass
from sparse_compile.codegen.triton.calls import LIMIT, Prepared, dtype_of, key_of, served
from sparse_compile.errors import BadShape
from sparse_compile.spec import AttentionSpec, KernelSpec
from sparse_compile.spec.target import Target
from sparse_compile.spec.view import Order


@functools.lru_cache(maxsize=1024)
def is_exact(spec: AttentionSpec, n_q: int, n_kv: int) -> bool:
    """Whether the lengths are multiples of the radices of all views."""
    return all(
        n_q % view.q.strides[0] == 0 and n_kv % view.kv.strides[0] == 0 for view in spec.parts
    )


@dataclass(frozen=True, eq=False)
class _Blocks:
    """What calls of equal shapes share.

    Attributes:
        prepared: operands and launches.
        passes: in the order in which they run.
        complete: whether the first section reaches every query, and every key.
        orders: of queries, by the names of the statistics that stand in them.
    """

    prepared: Prepared
    passes: tuple[Pass, ...]
    complete: tuple[bool, bool]
    orders: Mapping[str, Order]

    @property
    def spec(self) -> KernelSpec:
        """What the kernels were generated for."""
        spec: KernelSpec = self.prepared.spec
        return spec

    @staticmethod
    def of(
        call: AttentionCall,
        direction: str,
        tensors: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        widths: Mapping[str, Mapping[str, int]],
        **values: int,
    ) -> _Blocks:
        """For calls like this one; ``tensors`` as for :meth:`Prepared.of`.

        Args:
            widths: of the results of each kernel, by their names.
            values: of further parameters.
        """
        _check(call)
        (_, heads, n_q, n_kv), views = call.shape, call.spec.parts
        shape = call.q.shape[3], call.v.shape[3], dtype_of(call), Target.of(call.q.device).arch
        spec = KernelSpec(call.spec, *shape, is_exact(call.spec, n_q, n_kv))
        values["GROUP"] = heads // call.k.shape[1]
        orders = {f"STATISTICS_{v}": view.q for v, view in enumerate(views) if view.q.radices}
        values |= {f"lines_{v}_q": view.q.blocks(n_q) for v, view in enumerate(views)}
        prepared = Prepared.of(spec, call, direction, tensors, values)
        tiles = {name: prepared.launches.launchers[name].entry.tile for name in widths}
        passes = (Pass.of(name, call.spec, tiles[name], widths[name]) for name in widths)
        first_q, first_kv = (call.spec.sections(axis)[0][0] for axis in ("q", "kv"))
        complete = views[first_q].q.is_complete, views[first_kv].kv.is_complete
        return _Blocks(prepared, tuple(passes), complete, orders)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Block-sparse attention.

    Returns:
        out [B, Hq, Nq, Dv] in q's dtype, stored as [B, Nq, Hq, Dv], 0 on empty rows; and the
        natural log-sum-exp [B, Hq, Nq] in fp32, -inf on empty rows.
    """
    (batch, heads, n_q, _), width = call.shape, call.v.shape[3]
    _check_layout(call)
    out = call.q.new_empty(batch, n_q, heads, width).transpose(1, 2)
    lse = torch.empty((batch, heads, n_q), dtype=torch.float32, device=call.q.device)
    if not call.q.numel() or not call.k.numel():
        return out.zero_(), lse.fill_(-math.inf)

    def prepare() -> _Blocks:
        widths = {"forward": {"OUT": width, "LSE": 1}}
        return _Blocks.of(call, "forward", ({}, {"OUT": out}), widths)

    def run(blocks: _Blocks) -> tuple[Tensor, Tensor]:
        if not blocks.complete[0]:
            out.zero_()
            lse.fill_(-math.inf)
        running = blocks.prepared.running(call, {})
        blocks.passes[0].run(running, {"OUT": out, "LSE": lse}, lse)
        return out, lse

    return served(("forward", *key_of(call)), prepare, run, call.q.device)


def backward(call: AttentionCall, result: AttentionResult) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`: ``(dq, dk, dv)``, contiguous, in the dtype of q."""
    _check_layout(call)
    q, k, v = call.q, call.k, call.v
    if not q.numel() or not k.numel():
        return arguments.zeros(q), arguments.zeros(k), arguments.zeros(v)
    has_grad_lse, n_q = result.grad_lse is not None, q.shape[2]
    rows = (n_q // 128 + 1) * 128  # at least one that does not exist
    read = {"OUT": result.out, "GRAD_OUT": result.grad_out.to(q.dtype)}

    def prepare() -> _Blocks:
        widths = {
            "backward_query": {"GRAD_Q": q.shape[3]},
            "backward_key_value": {"GRAD_K": k.shape[3], "GRAD_V": v.shape[3]},
        }
        values = {"rows": rows, "HAS_GRAD_LSE": has_grad_lse}
        return _Blocks.of(call, "backward", (read, {}), widths, **values)

    def run(blocks: _Blocks) -> tuple[Tensor, Tensor, Tensor]:
        dq = arguments.gradient(q, blocks.complete[0])
        dk, dv = (arguments.gradient(t, blocks.complete[1]) for t in (k, v))
        lse = result.lse.contiguous()
        statistics = _statistics(lse, rows, bool(blocks.orders))
        running = blocks.prepared.running(call, read)
        running.given["STATISTICS"] = statistics
        by_query, by_key = blocks.passes
        taken = {"LSE": lse, "GRAD_LSE": arguments.single(result.grad_lse, lse), "GRAD_Q": dq}
        by_query.run(running, taken, lse)
        by_key.run(running, {"GRAD_K": dk, "GRAD_V": dv, **_in_order(blocks, statistics, n_q)}, lse)
        sign = blocks.prepared.operands.sign
        return dq if sign == 1 else dq.mul_(sign), dk, dv

    key = "backward", has_grad_lse, *key_of(call, *read.values())
    return served(key, prepare, run, q.device)


def _statistics(lse: Tensor, rows: int, filled: bool) -> Tensor:
    """Room for the statistics of queries, fp32 [2, B, H, rows], which the first kernel writes."""
    batch, heads, n_q = lse.shape
    statistics = lse.new_empty(2, batch, heads, rows)
    if filled:
        # What stands for a query that does not exist: places that fill up a block read it.
        statistics[0, ..., n_q:] = math.inf
        statistics[1, ..., n_q:] = 0.0
    return statistics


def _in_order(blocks: _Blocks, statistics: Tensor, n_q: int) -> dict[str, Tensor]:
    """The statistics of queries in the order of each view that is not the plain one."""
    found = {
        order: statistics.index_select(3, arguments.places_of(order, n_q, statistics.device))
        for order in dict.fromkeys(blocks.orders.values())
    }
    return {name: found[order] for name, order in blocks.orders.items()}


def _check_layout(call: AttentionCall) -> None:
    """Raise if the layout that was given is of other lengths; lists are unpacked for the call's."""
    given = call.layout
    if given is not None and (given.n_q, given.n_kv) != call.shape[2:]:
        found = given.n_q, given.n_kv
        raise BadShape(f"sparse_compile: a layout of {found} for lengths {call.shape[2:]}.")


def _check(call: AttentionCall) -> None:
    """Raise for shapes that do not fit together, or more than the kernels can number."""
    (batch, heads, n_q, n_kv), kv_heads = call.shape, call.k.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise BadShape(f"sparse_compile: {heads} query heads for {kv_heads} key heads.")
    if max(n_q, n_kv) >= LIMIT or max(batch, heads) > 65535:
        raise BadShape(
            f"sparse_compile: q {list(call.q.shape)} and k {list(call.k.shape)}: lengths must be "
            f"below {LIMIT}, batch and heads at most 65535."
        )

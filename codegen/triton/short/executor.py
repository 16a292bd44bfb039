"""Launch the kernels that hold all queries and all keys of a head: forward and backward."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.codegen import by_token
from sparse_compile.codegen.attend import Gradients
from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.triton import calls
from sparse_compile.codegen.triton.blocks.gradients import gradient_of
from sparse_compile.codegen.triton.blocks.learned import Looked, looked_up
from sparse_compile.codegen.triton.calls import Prepared, Running
from sparse_compile.codegen.triton.short.source import is_of_entry
from sparse_compile.codegen.triton.short.spec import spec_of
from sparse_compile.expr import KV, B, H, Q, table_index
from sparse_compile.layout.schedule import workers_of
from sparse_compile.spec.target import Target

#: Programs for each that a GPU runs at a time: with more of them, fewer batch entries share what
#: scores add; with fewer, the last ones leave it idle for longer.
_ROUNDS = 2


class _Programs(NamedTuple):
    """How a launch is divided: groups of batch entries, and how many are in each."""

    groups: int
    each: int

    @staticmethod
    def of(call: AttentionCall) -> _Programs:
        """For calls like this one."""
        batch, heads = call.q.shape[:2]
        each = -(-batch * heads // (_ROUNDS * workers_of(call.q.device)))
        each = min(max(each, 1), batch)
        return _Programs(-(-batch // each), each)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """As :func:`sparse_compile.codegen.triton.blocks.executor.forward`."""
    (batch, heads, n_q, _), width = call.q.shape, call.v.shape[3]
    out = call.q.new_empty(batch, n_q, heads, width).transpose(1, 2)
    lse = torch.empty((batch, heads, n_q), dtype=torch.float32, device=call.q.device)
    if not out.numel():
        return out, lse.fill_(-math.inf)

    def prepare() -> tuple[Prepared, _Programs]:
        return _prepared(call, "forward", {}, {"OUT": out})

    def run(prepared: Prepared, programs: _Programs) -> tuple[Tensor, Tensor]:
        given = {"OUT": out, "LSE": lse}
        prepared.running(call, {}).start("forward", (heads, programs.groups), given)
        return out, lse

    return calls.served(("short", "forward", *calls.key_of(call)), prepare, run, call.q.device)


def backward(call: AttentionCall, result: AttentionResult) -> Gradients:
    """As :func:`sparse_compile.codegen.triton.blocks.executor.backward`, of a whole attention."""
    if not call.q.numel():
        learned = (call.learned[i] for i in result.wanted)
        return tuple(map(calls.zeros, (call.q, call.k, call.v, *learned)))
    has_grad_lse = result.grad_lse is not None
    read = {"GRAD_OUT": result.grad_out.to(call.q.dtype)}
    names = {"GRAD_Q": call.q, "GRAD_K": call.k, "GRAD_V": call.v}
    made = {name: by_token.room_like(t) for name, t in names.items()}

    def prepare() -> tuple[Prepared, _Programs]:
        return _prepared(call, "backward", read, made, HAS_GRAD_LSE=has_grad_lse)

    def run(prepared: Prepared, programs: _Programs) -> Gradients:
        running = prepared.running(call, read)
        lse = result.lse.contiguous()
        given = {**made, "LSE": lse, "GRAD_LSE": calls.single(result.grad_lse, lse)}
        left = _started(running, given, programs, result.wanted)
        asked = [one for one in looked_up(call.spec) if one.number in left]
        others = [gradient_of(running, i, asked, left) for i in result.wanted]
        sign = prepared.operands.sign
        dq, dk, dv = made.values()
        return dq if sign == 1 else dq.mul_(sign), dk, dv, *others

    key = "short", "backward", has_grad_lse, *calls.key_of(call, *read.values())
    return calls.served(key, prepare, run, call.q.device)


def _prepared(
    call: AttentionCall,
    direction: str,
    read: dict[str, Tensor],
    written: dict[str, Tensor],
    **values: int,
) -> tuple[Prepared, _Programs]:
    """For calls like this one; tensors as for :meth:`Prepared.of`."""
    spec = spec_of(call, calls.dtype_of(call), Target.of(call.q.device).arch)
    assert spec is not None
    programs = _Programs.of(call)
    values |= {"heads": call.q.shape[1], "each": programs.each}
    return Prepared.of(spec, call, direction, (read, written), values), programs


def _started(
    running: Running, given: dict[str, Tensor], programs: _Programs, wanted: tuple[int, ...]
) -> dict[int, Tensor]:
    """Start the backward; what it leaves of each lookup whose tensor's gradient is asked for."""
    call, looked = running.call, looked_up(running.call.spec)
    left = {
        one.number: _room(call, one, programs.groups)
        for one in looked
        if table_index(one.lookup) in wanted
    }
    sums = {f"SUM_{one.number}": left.get(one.number) for one in looked}
    want = {f"WANT_{one.number}": one.number in left for one in looked}
    grid = call.q.shape[1], programs.groups
    running.start("backward", grid, {**given, **sums, **want})
    return left


def _room(call: AttentionCall, one: Looked, groups: int) -> Tensor:
    """For what the programs leave of a lookup: the gradient itself, if no two pairs read alike."""
    batch, heads, n_q, n_kv = call.shape
    shape = batch if is_of_entry(one) else groups, heads, n_q, n_kv
    of = call.learned[table_index(one.lookup)]
    itself = tuple(one.lookup.args) == (B, H, Q, KV) and tuple(of.shape) == shape
    dtype = of.dtype if itself else torch.float32
    return torch.empty(shape, dtype=dtype, device=of.device)

"""Launch the kernels for selected keys: forward and backward."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen import by_token
from sparse_compile.codegen.attend import Gradients
from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.cpu import selected as gathered
from sparse_compile.codegen.triton import calls
from sparse_compile.codegen.triton.calls import Prepared, Running
from sparse_compile.codegen.triton.selected import latent, united
from sparse_compile.codegen.triton.selected.spec import WIDE, SelectedKernelSpec, features_of
from sparse_compile.codegen.triton.tile import Tile
from sparse_compile.errors import BadShape
from sparse_compile.layout.listed import places
from sparse_compile.layout.schedule import workers_of
from sparse_compile.selection.selection import worklist
from sparse_compile.spec.target import Target

#: Entries of a unit of keys that one program handles at most.
_ENTRIES = 512
#: Keys are the outer loop of the forward for units of at least so many keys, selected by so many
#: rows on average, if the parts of a group take no more bytes. Of the first, 64 and 128 were tried
#: on an H200 (with 16 rows, 65536 queries: 128 gains 30 %); the other two are guesses.
_LONG, _OFTEN, _ROOM = 128, 1024, 8 << 30
#: Queries that the kernels by key, forward and backward, go through before the next, so that what
#: they read again of a group's queries may still be in a cache: 2 % faster on an H200.
_STRETCH = (8192, 16384)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """As :func:`sparse_compile.codegen.cpu.selected.forward`."""
    batch, heads, n_q, _ = call.q.shape
    out = call.q.new_empty((batch, n_q, heads, call.v.shape[3])).transpose(1, 2)
    lse = torch.empty((batch, heads, n_q), dtype=torch.float32, device=call.q.device)
    if call.is_empty:
        return out.zero_(), lse.fill_(-math.inf)

    def prepare() -> tuple[Prepared, _Way]:
        prepared = _prepared(call, "forward", ({}, {"OUT": out}))
        return prepared, _Way.of(_running(prepared, call, {}))

    def run(prepared: Prepared, way: _Way) -> tuple[Tensor, Tensor]:
        way.run(_running(prepared, call, {}), out, lse)
        return out, lse

    return calls.served(_key(call, "forward"), prepare, run, call.q.device)


def _key(call: AttentionCall, direction: str, *read: Tensor) -> Hashable:
    shared = is_shared(call.k, call.v)
    return direction, shared, *calls.key_of(call, call.index, call.count, *read)


def _prepared(
    call: AttentionCall,
    direction: str,
    tensors: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
) -> Prepared:
    """See :meth:`Prepared.of`.

    Raises:
        BadShape: for more than the kernels can number.
    """
    _check(call)
    shape = call.q.shape[3], call.v.shape[3], calls.dtype_of(call), Target.of(call.q.device).arch
    spec = SelectedKernelSpec(call.spec, *shape, call.members, is_shared(call.k, call.v))
    _, lists, units, most = call.index.shape
    values = {
        **{"lists": lists, "units": units, "most": most, "parts": 1, "first_group": 0},
        "GROUPS_PER_LIST": call.groups // lists,
        "GROUPS_PER_KEY": call.groups // call.k.shape[1],
    }
    return Prepared.of(spec, call, direction, tensors, values)


def _running(prepared: Prepared, call: AttentionCall, read: Mapping[str, Tensor]) -> Running:
    running = prepared.running(call, read)
    running.given.update(INDEX=call.index.contiguous(), COUNT=call.count.contiguous())
    return running


@dataclass(frozen=True, eq=False)
class _Way:
    """How a forward goes through its lists.

    Attributes:
        name: ``"by key"``, ``"latent"``, ``"by union"`` or ``"by query"``.
        parts: into which the keys of a query are cut.
    """

    name: str
    parts: int

    @staticmethod
    def of(launch: Running) -> _Way:
        """The way of calls like one that runs."""
        if is_by_key(launch):
            return _Way("by key", 1)
        parts, given = parts_of(launch), launch.given
        is_latent = "forward_latent" in launch.prepared.launchers and parts == 1
        if is_latent and latent.is_aligned(given["Q"], given["K"]):
            return _Way("latent", parts)
        by_union = parts == 1 and united.can_serve(launch)
        return _Way("by union" if by_union else "by query", parts)

    def run(self, launch: Running, out: Tensor, lse: Tensor) -> None:
        """Write the results of a call."""
        if self.name == "by key":
            _by_key_forward(launch, out, lse)
        elif self.name == "latent":
            grid = _grid_by_query(launch, "forward_latent")
            launch.start("forward_latent", grid, {"OUT": out, "LSE": lse})
        elif self.name == "by union":
            # The device decides which of the two does it.
            _by_query(launch, out, lse, self.parts, _by_union(launch, out, lse))
        else:
            _by_query(launch, out, lse, self.parts)


def is_by_key(launch: Running) -> bool:
    """Whether keys are the outer loop of the forward: each unit is read once for all its queries.

    That costs writing and reading a result for every entry, and pays where a unit is long and many
    queries select it: by the capacity of the lists, as their contents are on the device.
    """
    call, spec = launch.call, launch.prepared.spec
    (_, _, units, most), key_units = call.index.shape, -(-call.k.shape[2] // call.spec.unit_kv)
    entries = units * most
    room = call.q.shape[0] * entries * spec.rows * call.v.shape[3] * call.v.element_size()
    often = entries * spec.rows >= _OFTEN * key_units
    half = call.q.element_size() == 2 and not spec.adds_by_query
    return call.spec.unit_kv >= _LONG and half and often and room <= _ROOM


def parts_of(launch: Running) -> int:
    """Into how many parts the keys of a query are cut, so that few queries keep a GPU busy."""
    call = launch.call
    if call.q.device.type != "cuda":
        return 1
    programs = math.prod(_grid_by_query(launch, "forward"))
    tile: Tile = launch.tile("forward")
    most = call.index.shape[3] * call.spec.unit_kv // (2 * tile.n)
    return max(1, min(2 * workers_of(call.q.device) // programs, most))


def _grid_by_query(launch: Running, name: str, parts: int = 1) -> tuple[int, int, int]:
    call = launch.call
    subtiles: int = -(-launch.prepared.spec.rows // launch.tile(name).m)
    return call.index.shape[2] * subtiles * parts, call.groups, call.q.shape[0]


def _by_query(
    launch: Running, out: Tensor, lse: Tensor, parts: int, balance: Tensor | None = None
) -> None:
    """The forward by query; it does nothing if ``balance`` is below zero."""
    call, given = launch.call, {"OUT": out, "LSE": lse}
    own: dict[str, Any] = {"parts": parts, "PARTED": parts > 1}
    if balance is None:
        own["BALANCE"] = None
    else:
        given["BALANCE"] = balance
    grid = _grid_by_query(launch, "forward", parts)
    if parts > 1:
        rows = launch.prepared.spec.rows
        shape = (out.shape[0], call.groups, call.index.shape[2], parts, rows)
        given |= {"OUT": lse.new_empty((*shape, out.shape[3])), "LSE": lse.new_empty(shape)}
    launch.start("forward", grid, given, **own)
    if parts > 1:
        found = {"PART_OUT": given["OUT"], "PART_LSE": given["LSE"], "OUT": out, "LSE": lse}
        _merge(launch, found, call.groups, parts=parts, first_group=0, COUNTED=False)


def _by_union(launch: Running, out: Tensor, lse: Tensor) -> Tensor:
    """Write OUT and LSE, if the unions cost less than the lists.

    Returns:
        int64 [1]: below zero if they do, and so did write.
    """
    # Imports Triton.
    from sparse_compile.codegen.triton.selected.union_lists import unite

    spec = launch.prepared.spec
    index, count = launch.given["INDEX"], launch.given["COUNT"]
    lists = unite(index, count, united.neighbours(spec), united.COSTS)
    tensors = {"INDEX": lists.index, "NAMES": lists.names, "COUNT": lists.count}
    tensors |= {"BALANCE": lists.balance, "OUT": out, "LSE": lse}
    _, _, unions, most = lists.index.shape
    grid = united.programs(spec, launch.call)
    launch.start("forward_union", grid, tensors, unions=unions, most=most)
    return lists.balance


def _merge(launch: Running, tensors: dict[str, Tensor], groups: int, **own: Any) -> None:
    """Merge the parts of so many groups, from ``first_group`` on."""
    rows, _, batch = _grid_by_query(launch, "merge")
    launch.start("merge", (rows, groups, batch), tensors, **own)


def _by_key_forward(launch: Running, out: Tensor, lse: Tensor) -> None:
    """The forward with keys outermost; group after group, so that the parts take less room."""
    call, spec, work = launch.call, launch.prepared.spec, _work(launch, _STRETCH[0])
    (batch, _, units, most), n_work = call.index.shape, work["n_work"]
    for first in range(call.groups):
        shape = (batch, 1, units * most, spec.rows)
        parts = {
            "PART_OUT": out.new_empty((*shape, out.shape[3])),
            "PART_LSE": lse.new_empty(shape),
        }
        one = {"first_group": first, "groups": 1}
        launch.start("forward_by_key", (n_work, 1, batch), {**work, **parts, **one})
        found = {**parts, "OUT": out, "LSE": lse}
        _merge(launch, found, 1, parts=most, first_group=first, COUNTED=True)


def _work(launch: Running, stretch: int) -> dict[str, Any]:
    """Who handles which entries, and these by stretch of queries and by unit of keys."""
    call, given = launch.call, launch.given
    units, unit_q = -(-call.k.shape[2] // call.spec.unit_kv), call.spec.unit_q
    start, order = places(given["INDEX"], given["COUNT"], units, max(1, stretch // unit_q))
    work = worklist(start, order.shape[-1], max(1, _ENTRIES // unit_q))
    return {"WORK": work, "PLACES": order, "n_work": work.shape[2]}


def backward(call: AttentionCall, result: AttentionResult) -> Gradients:
    """As :func:`sparse_compile.codegen.cpu.selected.backward`."""
    if call.is_empty:
        wanted = (call.learned[number] for number in result.wanted)
        return tuple(map(calls.zeros, (call.q, call.k, call.v, *wanted)))
    if result.wanted:
        return gathered.backward(call, result)  # kernels know gradients of q, k and v alone
    has_grad_lse = result.grad_lse is not None
    read = {"OUT": result.out, "GRAD_OUT": result.grad_out.to(call.q.dtype)}

    def run(prepared: Prepared, _: None) -> Gradients:
        dq = by_token.room_like(call.q)
        dk, dv = (calls.zeros(t, torch.float32) for t in (call.k, call.v))
        lse = result.lse.contiguous()
        tensors = {
            **{"LSE": lse, "GRAD_LSE": calls.single(result.grad_lse, lse)},
            "DELTA": torch.empty_like(lse, memory_format=torch.contiguous_format),
            **{"GRAD_Q": dq, "GRAD_K": dk, "GRAD_V": dv},
        }
        launch = _running(prepared, call, read)
        # By query the gradient of queries and DELTA, for short units all gradients; then by key.
        grid = _grid_by_query(launch, "backward_query")
        launch.start("backward_query", grid, tensors, HAS_GRAD_LSE=has_grad_lse)
        if not prepared.spec.adds_by_query:
            work = _work(launch, _STRETCH[1])
            subtiles = call.spec.unit_kv // launch.tile("backward_key_value").n
            grid = work["n_work"] * subtiles, call.groups, call.q.shape[0]
            launch.start("backward_key_value", grid, {**work, **tensors})
        sign = prepared.operands.sign
        dk, dv = by_token.stored(dk, call.k), by_token.stored(dv, call.v)
        return dq if sign == 1 else dq.mul_(sign), dk, dv

    def prepare() -> tuple[Prepared, None]:
        return _prepared(call, "backward", (read, {})), None

    return calls.served(_key(call, "backward", *read.values()), prepare, run, call.q.device)


def is_shared(k: Tensor, v: Tensor) -> bool:
    """Whether wide values are the first features of keys: then they are loaded once."""
    if k.shape[3] <= WIDE:
        return False
    same = k.data_ptr() == v.data_ptr() and k.stride() == v.stride() and k.stride(3) == 1
    return same and v.shape[3] == features_of(k.shape[3])[0].dim


def _check(call: AttentionCall) -> None:
    """Raise for more than int32 and grids can number."""
    lengths, members = max(call.q.shape[2], call.k.shape[2]), max(call.q.shape[0], call.groups)
    entries = call.index.shape[2] * call.index.shape[3]
    if lengths >= calls.LIMIT or members > 65535 or entries >= 1 << 31:
        raise BadShape(
            f"sparse_compile: q {list(call.q.shape)}, k {list(call.k.shape)} and index "
            f"{list(call.index.shape)}: lengths must be below {calls.LIMIT}, batch and groups of "
            "heads at most 65535, and the entries of a list of all queries fewer than 2 ** 31."
        )

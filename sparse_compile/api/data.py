"""Tables and layouts of patterns in calls that run as they stand, kept while nothing changes.

Compiled code makes them in its graph at every call; there, Inductor decides what is kept.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile import ops
from sparse_compile.errors import BadDevice
from sparse_compile.expr import MaskExpr, table_index
from sparse_compile.layout.from_dense import NO_READS
from sparse_compile.layout.tensor_state import memory_of, state_of
from sparse_compile.ops.fresh_size import told_apart
from sparse_compile.ops.pattern import PATTERN_TABLE
from sparse_compile.ops.selection import CANONICAL_SELECTION
from sparse_compile.patterns.base import Pattern
from sparse_compile.patterns.data import tensors_of

#: Layouts of so many masks and lengths are kept; a long one takes some megabytes.
_MOST = 8

#: Index, rank and dtype of each table.
Tables = tuple[tuple[int, int, torch.dtype], ...]
#: Key of a mask (see :func:`sparse_compile.sites.annotation.bound_mask_named`), its tables; batch,
#: heads, n_q and n_kv; heads of the keys; its sizes; text of the spec, empty for tables alone;
#: where the attention runs.
Call = tuple[str, Tables, tuple[int, int, int, int], int, tuple[int, ...], str, torch.device]
#: The tables, and the lists of the blocks.
Data = tuple[list[Tensor], list[Tensor]]
_KEPT: OrderedDict[tuple[Any, ...], tuple[Hashable, Data]] = OrderedDict()
#: Living patterns that hold no tensors, by their identity.
_CONSTANT: set[int] = set()


def tables_of(expr: MaskExpr) -> Tables:
    """The tables of a mask that reads all that it has."""
    rank = {table_index(lookup): len(lookup.args) for lookup in expr.lookups}
    dtypes = enumerate(expr.tables)
    return tuple((index, rank[index], getattr(torch, dtype)) for index, dtype in dtypes)


def make_data(call: Call) -> Data:
    """The tables of a mask, and the lists of its blocks; none without the text of a spec."""
    key, tables, lengths, kv_heads, sizes, text, device = call
    made = [PATTERN_TABLE(key, *table, *lengths, device) for table in tables]
    if not text:
        return made, []
    where: tuple[Any, ...] = text, device, [], told_apart()
    return made, ops.LAYOUT(made, NO_READS, list(sizes), *lengths, kv_heads, *where)


def data_of(pattern: Pattern | None, call: Call) -> Data:
    """:func:`make_data`, made again only after the tensors of ``pattern`` were written to.

    A pattern is a promise where a mask tensor is none: writes that PyTorch does not count (through
    ``.data``, numpy or another process) do not reach it. Make a new pattern after them.

    Args:
        pattern: what the key of ``call`` names; None to keep nothing.
        call: as for :func:`make_data`.
    """
    state = None if pattern is None else _state(pattern)
    if state is None or _is_recorded(call[-1]):
        return make_data(call)
    # Keys are given once, so this one means this pattern even when the pattern is gone. And what is
    # made in inference mode cannot be saved for a backward.
    where = (*call, torch.is_inference_mode_enabled())
    kept = _KEPT.get(where)
    if kept is None or kept[0] != state:
        kept = _KEPT[where] = state, make_data(call)
        if len(_KEPT) > _MOST:
            _KEPT.popitem(last=False)
    _KEPT.move_to_end(where)
    return kept[1]


#: What of a mask is given with its tables: lengths, heads of the keys, sizes, spec and device.
GivenCall = tuple[tuple[int, int, int, int], int, tuple[int, ...], str, torch.device]


def given_data(tables: Sequence[Tensor], call: GivenCall) -> Data:
    """Tables of their own memory, and the lists of the blocks; calls share them while nothing
    writes to the tables.

    Args:
        tables: the tensors ``t0, t1, ...``, in the dtypes of the mask.
        call: see :data:`GivenCall`.
    """
    plain = all(type(tensor) is Tensor for tensor in tables)
    if torch.compiler.is_compiling() or not tables or not plain or _is_recorded(call[-1]):
        return _given_data(tables, call)
    states = tuple(state_of(tensor) for tensor in tables)
    if None in states:
        return _given_data(tables, call)
    # That a state is one of the same memory can only be told while that lives.
    memories = tuple(tensor.untyped_storage() for tensor in tables)
    known, key = memory_of(tables[0]), ("given", call, states, torch.is_inference_mode_enabled())
    found = known.get(key)
    if found is None or [memory() for memory in found[0]] != [*memories]:
        found = tuple(map(weakref.ref, memories)), _given_data(tables, call)
        known[key] = found
    data: Data = found[1]
    return data


def _given_data(tables: Sequence[Tensor], call: GivenCall) -> Data:
    lengths, kv_heads, sizes, text, device = call
    like = torch.contiguous_format
    own = [tensor.detach().clone(memory_format=like) for tensor in tables]
    return own, ops.LAYOUT(own, NO_READS, list(sizes), *lengths, kv_heads, text, device, [])


def canonical_of(index: Tensor, units: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The lists of any indices, see :func:`sparse_compile.selection.canonical`.

    Calls that use the same index share them while nothing writes to it.

    Args:
        index: integers [B, Hs, Uq, K], of a pattern.
        units: how many units of keys there are.
        device: where the lists are used.
    """
    if torch.compiler.is_compiling() or type(index) is not Tensor or _is_recorded(device):
        return _canonical(index, units, device)
    known = memory_of(index)
    key = "lists", units, device, torch.is_inference_mode_enabled()
    if key not in known:
        known[key] = _canonical(index, units, device)
    lists: tuple[Tensor, Tensor] = known[key]
    return lists


def _canonical(index: Tensor, units: int, device: torch.device) -> tuple[Tensor, Tensor]:
    lists: tuple[Tensor, Tensor] = CANONICAL_SELECTION(index.detach().to(device), units)
    return lists


def _state(pattern: Pattern) -> tuple[Hashable, ...] | None:
    """What the tables follow from, besides the lengths; None where that cannot be told."""
    if id(pattern) in _CONSTANT:
        return ()
    tensors = tensors_of(pattern)
    if tensors == []:
        _CONSTANT.add(id(pattern))
        weakref.finalize(pattern, _CONSTANT.discard, id(pattern))
    for tensor in tensors or ():
        if tensor.is_meta:
            raise BadDevice(
                f"sparse_compile: {pattern!r} reads a tensor on the meta device, which holds no "
                "data. Make it of one on the CPU or a GPU."
            )
    states = None if tensors is None else [state_of(tensor) for tensor in tensors]
    return None if states is None or None in states else tuple(states)


def _is_recorded(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded: its next run overwrites what is made now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

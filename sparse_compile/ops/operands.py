"""Checks of what an attention is computed from, before anything runs."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.errors import BadDevice, BadShape, UnsupportedDtype
from sparse_compile.layout.lists import count_worklists
from sparse_compile.ops.learned import check_learned
from sparse_compile.selection import check_lists
from sparse_compile.spec import AttentionSpec

#: Features of q and k, and of v, that attention to blocks takes.
WIDEST = (256, 256)
#: The same for selected units: those of the latent keys of DeepSeek-V3, and some more.
WIDEST_UNITS = (640, 512)
SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def widest(spec: AttentionSpec) -> tuple[int, int]:
    """How many features of q and k, and of v, the kernels of a spec take."""
    return WIDEST if spec.parts else WIDEST_UNITS


def check_call(call: AttentionCall) -> None:
    """Raise before anything runs if the operands and the selections of a call do not fit.

    Raises:
        BadShape, BadDevice, UnsupportedDtype: what does not fit.
        BadPattern: on the CPU, what :func:`check_lists` finds in the lists of a selection.
    """
    check_operands(call.q, call.k, call.v, widest(call.spec))
    check_learned(call)
    parts, of_blocks = call.spec.units, len(call.spec.parts)
    worklists = count_worklists(call.spec, call.q.device)
    first = of_blocks + 2 * worklists
    if len(call.lists) != first + 2 * len(parts):
        raise BadShape(
            f"sparse_compile: attention got {len(call.lists)} lists. Pass what the operator layout "
            f"makes for {of_blocks} parts of blocks on {call.q.device}: {of_blocks} vectors and "
            f"{worklists} worklists; then index and count for each of {len(parts)} parts of units."
        )
    for number, part in enumerate(parts):
        index, count = call.lists[first + 2 * number :][:2]
        check_selection(call, index, count, (part.unit_q, part.unit_kv))


def check_operands(q: Tensor, k: Tensor, v: Tensor, widest: tuple[int, int] = WIDEST) -> None:
    """Raise before anything runs if q, k and v do not fit together.

    Args:
        q, k, v: of a call.
        widest: features of q and k, and of v, at most.

    Raises:
        UnsupportedDtype: the dtype is not float32, float16 or bfloat16.
        BadDevice: they are on several devices.
        BadShape: one is not a dense tensor; ranks, batch, head counts, lengths or feature sizes
            disagree.
    """
    _check_dense(q=q, k=k, v=v)
    if q.dtype not in SUPPORTED_DTYPES:
        raise UnsupportedDtype(q.dtype)
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dtype == k.dtype == v.dtype:
        dtypes = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
        raise BadShape(f"sparse_compile: q, k and v must have one dtype, got {dtypes}. Cast them.")
    if not q.dim() == k.dim() == v.dim() == 4:
        raise BadShape(
            f"sparse_compile: q, k and v must be [B, H, N, D], got {shapes}. "
            "Use unsqueeze to add the missing dimension."
        )
    if not q.device == k.device == v.device:
        devices = f"q on {q.device}, k on {k.device}, v on {v.device}"
        raise BadDevice(
            f"sparse_compile: q, k and v must be on one device, got {devices}. "
            "Move them with .to()."
        )
    if min(q.shape[1], k.shape[1]) == 0:
        raise BadShape(f"sparse_compile: attention needs at least one head, got {shapes}.")
    if q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1]:
        raise BadShape(
            f"sparse_compile: {q.shape[1]} query heads cannot share {k.shape[1]} key and "
            f"{v.shape[1]} value heads. The number of query heads must be a multiple of both."
        )
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise BadShape(
            "sparse_compile: q [B, Hq, Nq, D], k [B, Hkv, Nkv, D] and v [B, Hkv, Nkv, Dv] must "
            f"agree in B, Hkv, Nkv and D, got {shapes}."
        )
    if not 1 <= q.shape[3] <= widest[0] or not 1 <= v.shape[3] <= widest[1]:
        either = " and ".join(map(str, dict.fromkeys(widest)))
        raise BadShape(f"sparse_compile: head dims must lie in 1 to {either}, got {shapes}.")


def _check_dense(**given: object) -> None:
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            what = f"a value of type {type(tensor).__name__}"
        elif tensor.layout is not torch.strided:
            what = f"one of layout {tensor.layout}"
        else:
            continue
        raise BadShape(f"sparse_compile: {name} must be a dense tensor, got {what}.")


def check_selection(
    call: AttentionCall, index: Tensor, count: Tensor, units: tuple[int, int]
) -> None:
    """Raise if a selection does not fit q, k and v; ``units`` are unit_q and unit_kv.

    Raises:
        BadShape, BadPattern: as :func:`check_call` does.
    """
    q, k, (unit_q, unit_kv) = call.q, call.k, units
    wanted = (q.shape[0], -(-q.shape[2] // unit_q))
    fits = index.dim() == 4 and (index.shape[0], index.shape[2]) == wanted
    fits = fits and index.shape[1] > 0 and q.shape[1] % index.shape[1] == 0
    # A group of heads shares a key head and a selection, so one number must divide the other.
    fits = fits and max(index.shape[1], k.shape[1]) % min(index.shape[1], k.shape[1]) == 0
    if not fits or count.shape != index.shape[:3]:
        raise BadShape(
            f"sparse_compile: a selection of index {list(index.shape)} and count "
            f"{list(count.shape)} for q {list(q.shape)}, k {list(k.shape)} and units of "
            f"{unit_q} queries. Give index [B, Hs, ceil(Nq / unit_q), K] and count without K; "
            "Hs divides the query heads, and divides the key heads or is a multiple of them."
        )
    if index.dtype != torch.int32 or count.dtype != torch.int32:
        raise BadShape(
            f"sparse_compile: a selection of index {index.dtype} and count {count.dtype}. "
            "Make both int32, as selection.canonical does."
        )
    if index.device.type == "cpu":
        check_lists(index, count, -(-k.shape[2] // unit_kv))

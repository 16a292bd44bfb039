"""The forward over unions of neighbouring lists: where it can serve, its tiles, and when it pays.

Neighbouring queries often select nearly the same keys. A program that holds several of their
units, and goes through the union of their lists, reads each unit of keys once for all of them and
gives the tensor cores more rows at a time; what a row did not select is masked. How much the lists
have in common is known on the device only, so it is decided there: both kernels are launched, and
the programs of one of them return at once.
"""

from __future__ import annotations

import math

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.triton.calls import Running
from sparse_compile.codegen.triton.selected.spec import WIDE, SelectedKernelSpec
from sparse_compile.codegen.triton.tile import Tile, padded, power_of_two
from sparse_compile.layout.schedule import workers_of

#: What an entry of a list costs the forward by query, and an entry of a union the forward over
#: unions, in tenths: 1.5 to 2.0 times as much on an H200, by head dim and units.
COSTS = (10, 16)
#: Rows of a tile, and units that it holds at most: their names are the bits of an int32.
_ROWS, _MOST = 64, 32
#: Entries of a union before equal ones become one, at most; so many a program sorts at a time.
_SLOTS = 1024


def union_tile(spec: SelectedKernelSpec) -> Tile | None:
    """The tile of the kernel; None where it is not made.

    It is for units of few rows, which leave room for others in a tile, and of keys that fill one.
    """
    single = spec.dtype == "float32" and spec.arch != "interpreter"
    if spec.adds_by_query or spec.rows > _ROWS // 2 or single:
        return None
    width = padded(max(spec.head_dim, spec.value_dim, 64))
    m = padded(neighbours(spec) * spec.rows)
    if spec.arch == "interpreter":
        return Tile(m, 32, 4, 1)
    n = 64 if width < WIDE else 32
    if spec.arch not in ("sm_90", "sm_100"):
        return Tile(m, 32, 4, 2 if width < WIDE else 1)
    aligned = spec.head_dim % 8 == spec.value_dim % 8 == 0
    whole = aligned and n <= spec.attention.unit_kv
    return Tile(m, n, 4, 3 if width < WIDE else 2, descriptors=whole)


def neighbours(spec: SelectedKernelSpec) -> int:
    """How many units of queries a program holds."""
    return min(_MOST, _ROWS // spec.rows)


def can_serve(launch: Running) -> bool:
    """Whether the kernel is worth trying; what the lists have in common, the device finds out.

    There are several lists, of a length that can be sorted.
    """
    spec, call = launch.prepared.spec, launch.call
    if call.index.shape[2] < 2 or union_tile(spec) is None:
        return False
    n, key_units = neighbours(spec), -(-call.k.shape[2] // call.spec.unit_kv)
    slots = power_of_two(n) * power_of_two(call.index.shape[3])
    return slots <= _SLOTS and n * key_units < (1 << 31) - 1 and is_large(launch)


def is_large(launch: Running) -> bool:
    """Whether programs of several units of queries, of which there are fewer, keep a GPU busy."""
    call = launch.call
    return math.prod(programs(launch.prepared.spec, call)) >= 2 * workers_of(call.q.device)


def programs(spec: SelectedKernelSpec, call: AttentionCall) -> tuple[int, int, int]:
    """The grid of the kernel."""
    return -(-call.index.shape[2] // neighbours(spec)), call.groups, call.q.shape[0]


def constants_of(neighbours: int, most: int, lines: int) -> dict[str, int]:
    """The constants of the kernel that makes ``lines`` unions, of lists of up to ``most`` entries.

    >>> constants_of(3, 16, 1000)
    {'NEIGHBOURS': 3, 'MEMBERS': 4, 'ROOM': 16, 'LINES': 16}
    """
    members, room = power_of_two(neighbours), power_of_two(most)
    together = max(1, min(_SLOTS // (members * room), power_of_two(lines)))
    return {"NEIGHBOURS": neighbours, "MEMBERS": members, "ROOM": room, "LINES": together}

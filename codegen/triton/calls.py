"""What calls of attention by Triton kernels share, to blocks and to units: prepared once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.entry import Kind
from sparse_compile.codegen.generators import generators
from sparse_compile.codegen.prepared import Launches, geometry, kept
from sparse_compile.codegen.runtime.launch import (
    DTYPE_NAMES,
    Launcher,
    Refused,
    current,
    launchers_of,
    strides,
)
from sparse_compile.codegen.triton.blocks import arguments
from sparse_compile.codegen.triton.predicate import COORDINATE_BITS
from sparse_compile.errors import UnsupportedDtype
from sparse_compile.spec.target import Target

LIMIT = 1 << COORDINATE_BITS
#: As many programs as split lines are for, where there is no GPU to ask.
_WORKERS_WITHOUT_GPU = 8
#: What calls of equal shapes share, by what they have in common.
PREPARED: dict[Hashable, Any] = {}


@functools.lru_cache(maxsize=1024)
def kernels_of(spec: Any) -> Mapping[str, Launcher]:
    """Generate, write and load the kernels of a spec, once; by the labels of their entries."""
    return launchers_of(generators().choose(spec).kernel)


@functools.lru_cache(maxsize=1024)
def _described(spec: Any, direction: str) -> frozenset[str]:
    """What the kernels of a direction read by descriptors."""
    return frozenset(
        p.tensor
        for label, launcher in kernels_of(spec).items()
        for p in launcher.entry.parameters
        if p.kind is Kind.DESCRIPTOR and label.startswith(direction)
    )


@dataclass(frozen=True, eq=False)
class Prepared:
    """What calls of equal shapes share; their sizes and their scale may differ.

    Attributes:
        spec: what the kernels were generated for.
        operands: what becomes of the tensors that a call gives.
        launches: of the kernels.
    """

    spec: Any
    operands: arguments.Operands
    launches: Launches

    @staticmethod
    def of(
        spec: Any,
        call: AttentionCall,
        direction: str,
        tensors: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        values: Mapping[str, Any],
    ) -> Prepared:
        """For calls like this one.

        Args:
            spec: what kernels are generated for.
            call: one of them.
            direction: ``"forward"`` or ``"backward"``, which names of kernels begin with.
            tensors: those [B, H, N, D] that kernels read beside q, k and v, by name; and those that
                they write, if they are told their strides.
            values: of further parameters.
        """
        launchers, (read, written) = kernels_of(spec), tensors
        described = _described(spec, direction)
        given = {"Q": call.q, "K": call.k, "V": call.v, **read}
        longer = arguments.too_short(call.spec.mask, call.tables, call.shape[2:])
        operands = arguments.Operands.prepared(given, described, call.scale, longer)
        found = operands.of(dict(given), call.tables)
        strided = {name.lower(): found[name] for name in given}
        strided |= {name.lower(): t for name, t in written.items()}
        batch, heads, n_q, n_kv = call.shape
        shape = {"batch": batch, "q_heads": heads, "kv_heads": call.k.shape[1]}
        shape |= {"n_q": n_q, "n_kv": n_kv}
        shape |= strides(**strided) | arguments.mask_values(call.spec.mask, found)
        return Prepared(spec, operands, Launches(launchers, {**shape, **values}))

    def running(self, call: AttentionCall, read: Mapping[str, Tensor]) -> Running:
        """One of the calls, with what it reads beside q, k and v."""
        operands = {"Q": call.q, "K": call.k, "V": call.v, **read}
        given = self.operands.of(operands, call.tables)
        given["scale"] = arguments.positive(call.scale)[1]
        for number, size in enumerate(call.sizes):
            given[f"s{number}"] = int(size)
        return Running(self, call, given)


@dataclass(frozen=True, eq=False)
class Running:
    """A call that runs.

    Attributes:
        prepared: what it shares with others.
        call: as it was given.
        given: what all its kernels may take, by name.
    """

    prepared: Prepared
    call: AttentionCall
    given: dict[str, Any]

    def start(
        self, label: str, grid: tuple[int, ...], given: Mapping[str, Any], **own: Any
    ) -> None:
        """Launch a kernel; see :meth:`Launches.start`."""
        self.prepared.launches.start(label, grid, {**self.given, **given}, **own)

    def tile(self, label: str) -> Any:
        """What a program of a kernel holds."""
        return self.prepared.launches.launchers[label].entry.tile

    @property
    def workers(self) -> int:
        """Programs that run at a time."""
        return workers_of(self.call.q.device)


class Shared(Protocol):
    """What is prepared."""

    @property
    def spec(self) -> Any:
        """What the kernels were generated for."""
        ...


_Shared = TypeVar("_Shared", bound=Shared)
_Result = TypeVar("_Result")


def served(
    key: Hashable,
    prepare: Callable[[], _Shared],
    run: Callable[[_Shared], _Result],
    device: torch.device,
) -> _Result:
    """What ``run`` gives for what calls of a key share, which ``prepare`` makes.

    Where a kernel turns out not to fit the device, the next generator serves from then on.
    """
    while True:
        shared = PREPARED.get(key) or kept(PREPARED, key, prepare())
        try:
            with current(device):
                return run(shared)
        except Refused as why:
            generators().refuse(shared.spec, str(why))
            forget()


def forget() -> None:
    """Prepare everything anew."""
    kernels_of.cache_clear()
    _described.cache_clear()
    PREPARED.clear()


def key_of(call: AttentionCall, *read: Tensor) -> tuple[Hashable, ...]:
    """What calls have in common that are prepared together."""
    sign = arguments.positive(call.scale)[0]
    return sign, call.spec, geometry((call.q, call.k, call.v, *read, *call.tables))


def dtype_of(call: AttentionCall) -> str:
    """The name of the dtype of its operands."""
    if call.q.dtype not in DTYPE_NAMES:
        raise UnsupportedDtype(call.q.dtype)
    return DTYPE_NAMES[call.q.dtype]


def workers_of(device: torch.device) -> int:
    """Programs that run at a time: two to a multiprocessor."""
    return 2 * Target.of(device).workers if device.type == "cuda" else _WORKERS_WITHOUT_GPU

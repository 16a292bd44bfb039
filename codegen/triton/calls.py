"""What calls of attention by Triton kernels share, to blocks and to units: prepared once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.entry import Kind, Parameter
from sparse_compile.codegen.generators import generators
from sparse_compile.codegen.repeated import REPEATS, kept
from sparse_compile.codegen.runtime.descriptors import described_tiles
from sparse_compile.codegen.runtime.launch import (
    DTYPE_NAMES,
    Launcher,
    Refused,
    current,
    launchers_of,
    strides,
    table_values,
    watcher,
)
from sparse_compile.codegen.triton.blocks.source import direct_lookups
from sparse_compile.codegen.triton.entries import learned_ranks, table_ranks
from sparse_compile.codegen.triton.predicate import COORDINATE_BITS
from sparse_compile.errors import UnsupportedDtype
from sparse_compile.spec import AttentionSpec

LIMIT = 1 << COORDINATE_BITS
#: What calls of equal shapes share, by what they have in common.
PREPARED: dict[Hashable, Any] = {}


@functools.lru_cache(maxsize=1024)
def kernels_of(spec: Any) -> Mapping[str, Launcher]:
    """Generate, write and load the kernels of a spec, once; by the labels of their entries."""
    return launchers_of(generators().choose(spec).kernel)


def is_usable(t: Tensor, described: bool) -> bool:
    """Whether kernels read a tensor as it is: rows are contiguous, and aligned for descriptors."""
    by_batch, by_head, by_token, by_dim = t.stride()
    # Offsets within a tile are int32.
    usable = (by_dim == 1 or t.shape[-1] == 1) and 0 <= by_token < 1 << 22
    if usable and described:
        unit = 16 // t.element_size()
        aligned = (by_batch | by_head | by_token) & unit - 1 == 0  # unit is a power of two
        usable = t.data_ptr() % 16 == 0 and aligned and min(by_batch, by_head, by_token) > 0
    return usable


@dataclass(frozen=True)
class Operands:
    """How what a call is given becomes what kernels read.

    Attributes:
        sign: that q is multiplied with.
        copied: names of tensors that are made contiguous.
        longer: tables that have to reach further: number, dimension and length.
    """

    sign: float
    copied: tuple[str, ...]
    longer: tuple[tuple[int, int, int], ...]

    @staticmethod
    def prepared(
        given: Mapping[str, Tensor],
        described: Collection[str],
        scale: float,
        longer: tuple[tuple[int, int, int], ...],
    ) -> Operands:
        """For tensors [B, H, N, D] like these, of which some are read by descriptors."""
        sign = positive(scale)[0]
        signed = {**given, "Q": given["Q"] if sign == 1 else given["Q"] * sign}
        copied = (name for name, t in signed.items() if not is_usable(t, name in described))
        return Operands(sign, tuple(copied), longer)

    def of(self, given: dict[str, Any], call: AttentionCall) -> dict[str, Any]:
        """What a call gives by name, the tensors of its mask and its score added."""
        if self.sign != 1:
            given["Q"] = given["Q"] * self.sign
        for name in self.copied:
            given[name] = given[name].clone(memory_format=torch.contiguous_format)
        for number, table in enumerate(call.tables):
            given[f"t{number}"] = table
        for number, table in enumerate(call.learned):
            given[f"w{number}"] = table
        for number, axis, n in self.longer:
            table = given[f"t{number}"]
            # Its last entry is repeated.
            nearest = torch.arange(n, device=table.device).clamp_(max=table.shape[axis] - 1)
            given[f"t{number}"] = table.index_select(axis, nearest)
        return given


def positive(scale: float) -> tuple[float, float]:
    """``(sign, size)``, ``scale = sign * size``, size > 0: kernels compare scores unscaled."""
    if scale > 0:
        return 1.0, scale
    return (-1.0, -scale) if scale < 0 else (0.0, 1.0)


def described(parameter: Parameter, t: Tensor) -> Any:
    """The descriptor of the tiles of [., ., N, .], N taken apart into its digits."""
    (first, second, n, last), (*outer, step, inner) = t.shape, t.stride()
    radices = parameter.radices
    digits = [math.prod(radices[k:]) for k in range(len(radices) + 1)]
    shape = [first, second, n // digits[0], *radices, last]
    strides = [*outer, *(digit * step for digit in digits), inner]
    placed = parameter.dtype if parameter.placed else ""
    return described_tiles(t, shape, strides, parameter.block, placed)


def single(grad_lse: Tensor | None, unused: Tensor) -> Tensor:
    """The gradient of the log-sum-exp; anything where there is none."""
    return unused if grad_lse is None else grad_lse.to(torch.float32).contiguous()


def too_short(
    spec: AttentionSpec, tables: Sequence[Tensor], lengths: tuple[int, int]
) -> tuple[tuple[int, int, int], ...]:
    """Tables that a plain ``q`` or ``kv`` indexes beyond their end: number, dimension, length."""
    found = []
    for number, axis, coordinate in sorted(direct_lookups(spec)):
        n = lengths[0 if coordinate == "q" else 1]
        if tables[number].shape[axis] < n:
            found.append((number, axis, n))
    return tuple(found)


def zeros(of: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A gradient of zeros, contiguous."""
    return torch.zeros(of.shape, dtype=dtype or of.dtype, device=of.device)


@dataclass(frozen=True, eq=False)
class Prepared:
    """What calls of equal shapes share; their sizes and their scale may differ.

    Attributes:
        spec: what the kernels were generated for.
        operands: what becomes of the tensors that a call gives.
        launchers: of the kernels, by the labels of their entries.
        values: of parameters that are the same in all calls, by name.
    """

    spec: Any
    operands: Operands
    launchers: Mapping[str, Launcher]
    values: Mapping[str, Any]

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
        described = {
            parameter.tensor
            for label, launcher in launchers.items()
            for parameter in launcher.entry.parameters
            if parameter.kind is Kind.DESCRIPTOR and label.startswith(direction)
        }
        given = {"Q": call.q, "K": call.k, "V": call.v, **read}
        longer = too_short(call.spec, call.tables, call.shape[2:])
        operands = Operands.prepared(given, described, call.scale, longer)
        found = operands.of(dict(given), call)
        strided = {name.lower(): found[name] for name in given}
        strided |= {name.lower(): t for name, t in written.items()}
        batch, heads, n_q, n_kv = call.shape
        shape = {"batch": batch, "q_heads": heads, "kv_heads": call.k.shape[1]}
        shape |= {"n_q": n_q, "n_kv": n_kv}
        shape |= strides(**strided)
        names = [f"t{number}" for number in table_ranks(call.spec.mask, call.spec.score)]
        names += [f"w{number}" for number in learned_ranks(call.spec.score)]
        for name in names:
            # Its strides and sizes; the tensor itself differs between calls.
            _, *sizes = table_values(name, found[name]).items()
            shape |= sizes
        return Prepared(spec, operands, launchers, {**shape, **values})

    def running(self, call: AttentionCall, read: Mapping[str, Tensor]) -> Running:
        """One of the calls, with what it reads beside q, k and v."""
        operands = {"Q": call.q, "K": call.k, "V": call.v, **read}
        given = self.operands.of(operands, call)
        given["scale"] = positive(call.scale)[1]
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
        """Launch a kernel.

        Args:
            label: of its entry.
            grid: programs along up to three dimensions.
            given: tensors, by the names of parameters or of what these describe, and numbers.
            own: values of further parameters.
        """
        launcher = self.prepared.launchers[label]
        entry = launcher.entry
        values = {"SECTION": entry.section, **self.prepared.values, **own, **self.given, **given}
        values |= dict.fromkeys(entry.absent)
        for parameter in entry.parameters:
            if parameter.kind is Kind.DESCRIPTOR and parameter.name not in entry.absent:
                values[parameter.name] = described(parameter, values[parameter.tensor])
        launcher(grid, values)

    def tile(self, label: str) -> Any:
        """What a program of a kernel holds."""
        return self.prepared.launchers[label].entry.tile


_Way = TypeVar("_Way")
_Result = TypeVar("_Result")


def served(
    key: Hashable,
    prepare: Callable[[], tuple[Prepared, _Way]],
    run: Callable[[Prepared, _Way], _Result],
    device: torch.device,
) -> _Result:
    """What ``run`` gives for what calls of a key share, which ``prepare`` makes: launches, and how.

    Where a kernel turns out not to fit the device, the next generator serves from then on.
    """
    while True:
        prepared, way = PREPARED.get(key) or kept(PREPARED, key, prepare())
        try:
            with current(device):
                return run(prepared, way)
        except Refused as why:
            generators().refuse(prepared.spec, str(why))
            forget()


def forget() -> None:
    """Prepare everything anew."""
    if watcher.current is not None:
        watcher.current.did_more = True  # what was started so far is started again
    kernels_of.cache_clear()
    PREPARED.clear()
    REPEATS.clear()


def key_of(call: AttentionCall, *read: Tensor) -> tuple[Hashable, ...]:
    """What calls have in common that are prepared together."""
    tensors = call.q, call.k, call.v, *read, *call.tables, *call.learned
    known = [(t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15) for t in tensors]
    return positive(call.scale)[0], call.spec, *known


def dtype_of(call: AttentionCall) -> str:
    """The name of the dtype of its operands."""
    if call.q.dtype not in DTYPE_NAMES:
        raise UnsupportedDtype(call.q.dtype)
    return DTYPE_NAMES[call.q.dtype]

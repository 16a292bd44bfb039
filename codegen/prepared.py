"""Launches that are repeated: what does not change between calls is worked out once.

A repeated call looks its launches up, allocates its results, fills in addresses and numbers and
starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparse_compile.codegen.entry import Entry, Kind, Parameter
from sparse_compile.codegen.runtime.direct import STREAM, Start, start_of
from sparse_compile.codegen.runtime.launch import Launcher, descriptor_class, watcher

#: Addresses whose descriptors a launch keeps, and calls of different shapes that are kept.
_ADDRESSES, _CALLS = 64, 256
#: Integers from here on are of another type in a kernel.
_WIDE = 1 << 31
_Made = TypeVar("_Made")
#: Where an address is found: the number of a tensor, and bytes behind its start.
Place = tuple[int, int]


def geometry(tensors: Iterable[Tensor]) -> tuple[Hashable, ...]:
    """All that launches depend on of some tensors, but for where exactly they are."""
    return tuple(
        [(t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15) for t in tensors],
    )


def kept(calls: dict[Hashable, Any], key: Hashable, made: _Made) -> _Made:
    """The same, and from now on what ``calls`` holds for a key."""
    if len(calls) >= _CALLS:
        calls.clear()
    calls[key] = made
    return made


class _Address:
    """Stands for a tensor in a descriptor, without keeping its memory."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class Box:
    """Tiles of tensors of one shape, as the copy engine reads them.

    Attributes:
        shape, strides: of all of it, in up to five dimensions; the strides in elements.
        block: shape of a tile.
        known: descriptors by address.
    """

    shape: list[int]
    strides: list[int]
    block: list[int]
    known: dict[int, Any] = field(default_factory=dict)

    @staticmethod
    def of(parameter: Parameter, t: Tensor) -> Box:
        """Tiles of [., ., N, .], N taken apart into its digits."""
        (first, second, n, last), (*outer, step, inner) = t.shape, t.stride()
        radices = parameter.radices
        digits = [math.prod(radices[k:]) for k in range(len(radices) + 1)]
        shape = [first, second, n // digits[0], *radices, last]
        strides = [*outer, *(digit * step for digit in digits), inner]
        return Box(shape, strides, list(parameter.block))

    def descriptor(self, base: Any) -> Any:
        """The descriptor of a tensor, or of what stands for one."""
        return descriptor_class()(base, self.shape, self.strides, self.block)

    def at(self, address: int, dtype: torch.dtype) -> Any:
        """The descriptor of a tensor at an address, made once for each."""
        found = self.known.get(address)
        if found is None:
            if len(self.known) >= _ADDRESSES:
                self.known.clear()
            found = self.known[address] = self.descriptor(_Address(address, dtype))
        return found


@dataclass(frozen=True)
class _Form:
    """Where that stands among the parameters of a kernel which a call gives.

    Attributes:
        pointers, lists, numbers: places and names, by kind.
        described: places of descriptors.
        later: names of all that is filled in later, or never.
    """

    pointers: list[tuple[int, str]]
    lists: list[tuple[int, str]]
    numbers: list[tuple[int, str]]
    described: list[tuple[int, Parameter]]
    later: dict[str, None]

    @staticmethod
    def of(entry: Entry, given: Sequence[str]) -> _Form:
        """That of an entry, for what is given by name."""
        places: dict[Kind, list[tuple[int, str]]] = {kind: [] for kind in Kind}
        described, names = [], set(given) - entry.absent
        for place, parameter in enumerate(entry.parameters):
            if parameter.kind is Kind.DESCRIPTOR and parameter.name not in entry.absent:
                described.append((place, parameter))
            elif parameter.name in names:
                places[parameter.kind].append((place, parameter.name))
        later = dict.fromkeys([*entry.absent, *given, *(p.name for _, p in described)])
        numbers = places[Kind.SIZE] + places[Kind.NUMBER]
        return _Form(places[Kind.POINTER], places[Kind.LIST], numbers, described, later)


class Launch:
    """A launch of which everything is known but what a call gives: tensors, and numbers.

    Args:
        launcher: of the kernel.
        values: of its parameters by name; those of others are left out.
        given: what the first call gives, by the names of parameters or of the tensors that they
            describe. Later calls give tensors of the same shapes, strides and dtypes, and any
            numbers for parameters that compile nothing.
    """

    def __init__(
        self, launcher: Launcher, values: Mapping[str, Any], given: Mapping[str, Any]
    ) -> None:
        self.launcher, names = launcher, tuple(given)
        form: _Form | None = launcher.forms.get(names)
        if form is None:
            form = launcher.forms[names] = _Form.of(launcher.entry, names)
        self._pointers, self._lists, self._numbers = form.pointers, form.lists, form.numbers
        self._boxes = [(at, p.tensor, Box.of(p, given[p.tensor])) for at, p in form.described]
        self._values = launcher.entry.ordered({**values, **form.later})
        # The kernel for the usual values, once it is compiled; and that for a grid.
        self._compiled: Any = None
        self._grid: tuple[int, ...] | None = None
        self._run: Callable[..., Any]

    def __call__(self, grid: tuple[int, ...], given: Mapping[str, Any]) -> None:
        """Launch it on the current device.

        Args:
            grid: programs along up to three dimensions.
            given: tensors and numbers by name; others are left out.
        """
        if watcher.current is not None:
            watcher.current.started.append((self, grid, given))
        if self._compiled is None:
            self._ask(grid, given)
            return
        arguments, addresses, wide = self._values.copy(), 0, False
        for place, name in self._pointers:
            arguments[place] = address = given[name].data_ptr()
            addresses |= address
        for place, name in self._lists:
            arguments[place] = given[name].data_ptr()
        for place, name in self._numbers:
            arguments[place] = number = given[name]
            wide |= not -_WIDE <= number < _WIDE
        if addresses & 15 or wide:
            self._ask(grid, given)
            return
        for place, name, box in self._boxes:
            arguments[place] = box.at(given[name].data_ptr(), given[name].dtype)
        if grid != self._grid:
            self._grid, self._run = grid, self._compiled[(*grid, 1, 1)[:3]]
        self._run(*arguments)

    def _ask(self, grid: tuple[int, ...], given: Mapping[str, Any]) -> None:
        """Launch it with all that Triton may look at, and keep the kernel if it is the usual one.

        That is the one for aligned tensors and for numbers of 32 bits.
        """
        arguments = self._values.copy()
        for place, name in (*self._pointers, *self._lists, *self._numbers):
            arguments[place] = given[name]
        for place, name, box in self._boxes:
            arguments[place] = box.descriptor(given[name])
        compiled = self.launcher.launched(grid, arguments)
        aligned = not any(given[name].data_ptr() & 15 for _, name in self._pointers)
        if aligned and all(_is_narrow(given[name]) for _, name in self._numbers):
            self._compiled = compiled

    def bound(
        self, grid: tuple[int, ...], given: Mapping[str, Any], places: Callable[[Tensor], Place]
    ) -> Bound | None:
        """The launch of this grid and these numbers, which takes addresses alone.

        None unless the kernel that it starts is the usual one.

        Args:
            grid: programs along up to three dimensions.
            given: as for a call.
            places: where the address of a tensor will be found.
        """
        numbers = [(place, given[name]) for place, name in self._numbers]
        unaligned = any(given[name].data_ptr() & 15 for _, name in self._pointers)
        if self._compiled is None or unaligned or not all(map(_is_narrow, dict(numbers).values())):
            return None
        arguments = self._values.copy()
        for place, number in numbers:
            arguments[place] = number
        boxes = [(place, box, given[name]) for place, name, box in self._boxes]
        examples = [box.descriptor(tensor) for _, box, tensor in boxes]
        start = start_of(self._compiled, (*grid, 1, 1)[:3], arguments, examples)
        pointers = [(p, places(given[name])) for p, name in (*self._pointers, *self._lists)]
        described = [
            Filled(start.places[p], places(t), partial(_encoded, encode, box, t.dtype))
            for (p, box, t), encode in zip(boxes, start.encode, strict=True)
        ]
        return Bound(start, [(start.places[p], *where) for p, where in pointers], described)


def _encoded(encode: Callable[[Any], Any], box: Box, dtype: torch.dtype, address: int) -> Any:
    return encode(box.descriptor(_Address(address, dtype)))


def _is_narrow(number: float) -> bool:
    return -_WIDE <= number < _WIDE


@dataclass(frozen=True, eq=False)
class Filled:
    """A descriptor that a launch fills in.

    Attributes:
        place: among the arguments.
        source: where the address of its tensor is found.
        make: what stands for it, from that address.
        known: the same by address.
    """

    place: int
    source: Place
    make: Callable[[int], Any]
    known: dict[int, Any] = field(default_factory=dict)

    def at(self, address: int) -> Any:
        """What stands for it, made once for an address."""
        found = self.known.get(address)
        if found is None:
            if len(self.known) >= _ADDRESSES:
                self.known.clear()
            found = self.known[address] = self.make(address)
        return found


@dataclass(frozen=True, eq=False)
class Bound:
    """A launch of which everything is known but where its tensors are.

    Attributes:
        start: starts the kernel.
        pointers: for each tensor its place among the arguments, and where its address is found.
        described: its descriptors.
    """

    start: Start
    pointers: list[tuple[int, int, int]]
    described: list[Filled]

    def __call__(self, addresses: Sequence[int], device: int) -> None:
        """Launch it on a device, which is the current one."""
        start = self.start
        arguments = start.arguments.copy()
        if start.stream is not None:
            arguments[STREAM] = start.stream(device)
        for place, source, offset in self.pointers:
            arguments[place] = addresses[source] + offset
        for one in self.described:
            source, offset = one.source
            arguments[one.place] = one.at(addresses[source] + offset)
        start.run(*arguments)


@dataclass(frozen=True, eq=False)
class Launches:
    """The launches of calls of equal shapes, prepared as they are needed first.

    Attributes:
        launchers: of the kernels, by the labels of their entries.
        values: of parameters that are the same in all calls, by name.
    """

    launchers: Mapping[str, Launcher]
    values: Mapping[str, Any]
    _known: dict[tuple[Any, ...], Launch] = field(default_factory=dict)

    def start(
        self, label: str, grid: tuple[int, ...], given: Mapping[str, Any], **own: Any
    ) -> None:
        """Launch a kernel.

        Args:
            label: of its entry.
            grid: programs along up to three dimensions.
            given: what differs between calls: tensors, and numbers that compile nothing.
            own: values of further parameters, for which a launch is prepared.
        """
        key = label, *own.values()
        launch = self._known.get(key)
        if launch is None:
            launcher = self.launchers[label]
            values = {"SECTION": launcher.entry.section, **self.values, **own}
            launch = self._known[key] = Launch(launcher, values, given)
        launch(grid, given)

"""Calls that are repeated: what the first one asked for and started, without what it looked up.

The first call of its kind is watched. If all that it did was to ask for memory, some of it filled
with zeros or with what :func:`copied` copies, and to start kernels that are prepared, then a call
of the same kind does the same with other addresses: it allocates and launches, and nothing else.
What else a call may do (a copy of an operand, an order for a strided view, a selection that is
unpacked, waiting for the device) is seen, and such calls take the whole way each time.

Calls are of one kind if all that the host can know of them is equal: shapes, strides, dtypes,
devices and alignments of tensors, shapes of lists, and all other arguments. What does not wait for
a device can decide on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_compile.codegen.runtime.descriptors import is_descriptor, remaker
from sparse_compile.codegen.runtime.direct import STREAM, Start, allocator, start_of
from sparse_compile.codegen.runtime.launch import watcher, watching

#: Operators that ask for memory, and give it as it is.
_ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)
#: Those of which it is filled with zeros.
_ZEROS = (torch.ops.aten.zeros.default, torch.ops.aten.new_zeros.default)
_CLONE = torch.ops.aten.clone.default
#: The first call of a kind may still make what later ones find; so many are watched.
_WATCHED = 3
#: Addresses whose descriptors a launch keeps.
_ADDRESSES = 64
#: Calls of different kinds that are kept.
_CALLS = 256
_Made = TypeVar("_Made")
#: What is known of calls, by kind.
REPEATS: dict[Hashable, Any] = {}
#: Types of devices whose kernels are launched.
DEVICES = ("cuda",)

Kind = tuple[Sequence["Tensor | None"], Sequence[Tensor], Hashable]


def kept(calls: dict[Hashable, Any], key: Hashable, made: _Made) -> _Made:
    """The same, and from now on what ``calls`` holds for a key."""
    if len(calls) >= _CALLS:
        calls.clear()
    calls[key] = made
    return made


def repeated(kind: Callable[..., Kind]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have calls of a function that runs kernels repeated.

    Args:
        kind: of the same arguments: the tensors that it computes from, the first on the device, or
            none for a call that is not repeated; the lists that it follows, contiguous; and all
            others.
    """

    def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def call(*args: Any, **named: Any) -> Any:
            tensors, lists, others = kind(*args, **named)
            first = tensors[0] if tensors else None
            if first is None or first.device.type not in DEVICES or watcher.current is not None:
                return run(*args, **named)  # nothing to repeat, or a part of what is watched
            addresses, known = _known(tensors)
            key = run, others, first.device, known, tuple([t.shape for t in lists])
            found = REPEATS.get(key)
            if type(found) is Repeat:
                addresses += [t.data_ptr() for t in lists]
                return found(addresses, first.device)
            if found == _WATCHED:
                return run(*args, **named)
            watch = _Watch()
            with watch, watching(watch):
                results = run(*args, **named)
            kept(REPEATS, key, watch.repeat([*tensors, *lists], results) or (found or 0) + 1)
            return results

        return call

    return decorate


def copied(constant: Tensor) -> Tensor:
    """A copy of a tensor that is never written to, and is the same for all calls of a kind."""
    if watcher.current is not None:
        watcher.current.constants.append(constant)
    return constant.clone()


def _known(tensors: Sequence[Tensor | None]) -> tuple[list[int], Hashable]:
    """Where some tensors are, and all else that the host decides by."""
    addresses: list[int] = []
    known: list[Hashable] = []
    for t in tensors:
        if t is None:
            addresses.append(0)
            known.append(t)
        else:
            address = t.data_ptr()
            addresses.append(address)
            known.append((t.shape, t.stride(), t.dtype, address & 15))
    return addresses, tuple(known)


@dataclass(frozen=True)
class Memory:
    """A tensor that a call makes.

    Attributes:
        shape, strides, dtype: of it.
        new: makes one from these, on the device.
        zero: whether it is filled with zeros.
        constant: what it is a copy of, if it is one.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    new: Callable[..., Tensor]
    zero: bool = False
    constant: Tensor | None = field(default=None, compare=False)

    @staticmethod
    def like(t: Tensor, zero: bool = False, constant: Tensor | None = None) -> Memory:
        """That of a tensor."""
        return Memory(tuple(t.shape), t.stride(), t.dtype, allocator(t.device), zero, constant)

    def made(self) -> Tensor:
        """One like it. Nothing has happened in a call before its tensors are made."""
        found = self.new(self.shape, self.strides, self.dtype)
        if self.constant is not None:
            return found.copy_(self.constant)
        return found.zero_() if self.zero else found

    @property
    def is_whole(self) -> bool:
        """Whether nothing lies between its entries."""
        steps = (step * (n - 1) for step, n in zip(self.strides, self.shape, strict=True))
        return math.prod(self.shape) in (0, 1 + sum(steps))


class _Address:
    """Stands for a tensor in a descriptor, without keeping its memory."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True, eq=False)
class Described:
    """A descriptor that a launch fills in.

    Attributes:
        place: among the arguments.
        source, offset: where the address of its tensor is found.
        make: a descriptor, from what stands for its tensor.
        dtype: of that.
        encode: what stands for it among the arguments.
        known: the same by address.
    """

    place: int
    source: int
    offset: int
    make: Callable[[Any], Any]
    dtype: torch.dtype
    encode: Callable[[Any], Any]
    known: dict[int, Any] = field(default_factory=dict)

    def at(self, address: int) -> Any:
        """What stands for it, made once for an address."""
        found = self.known.get(address)
        if found is None:
            if len(self.known) >= _ADDRESSES:
                self.known.clear()
            found = self.encode(self.make(_Address(address, self.dtype)))
            self.known[address] = found
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
    described: list[Described]

    @staticmethod
    def of(
        compiled: Any,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        place_of: Callable[[Tensor], tuple[int, int]],
    ) -> Bound:
        """A launch as it was seen.

        Args:
            compiled: what Triton compiled.
            grid: programs along three dimensions.
            arguments: in the order of its parameters.
            place_of: the number of the tensor that a tensor is a part of, and bytes before it.
        """
        start = start_of(compiled, grid, arguments)
        encode, pointers, described = iter(start.encode), [], []
        for place, argument in zip(start.places, arguments, strict=True):
            if isinstance(argument, Tensor):
                pointers.append((place, *place_of(argument)))
            elif is_descriptor(argument):
                where, make = place_of(argument.base), remaker(argument)
                described.append(Described(place, *where, make, argument.base.dtype, next(encode)))
        return Bound(start, pointers, described)

    def __call__(self, addresses: Sequence[int], device: int) -> None:
        """Launch it on a device, which is the current one."""
        start = self.start
        arguments = start.arguments.copy()
        if start.stream is not None:
            arguments[STREAM] = start.stream(device)
        for place, source, offset in self.pointers:
            arguments[place] = addresses[source] + offset
        for one in self.described:
            arguments[one.place] = one.at(addresses[one.source] + one.offset)
        start.run(*arguments)


@dataclass(frozen=True, eq=False)
class Repeat:
    """What calls of a kind do.

    Attributes:
        memory: the tensors that they make; results are the first of them.
        launches: the kernels that they start, in order.
        results: how many tensors they return, and as what.
    """

    memory: tuple[Memory, ...]
    launches: tuple[Bound, ...]
    results: tuple[int, type]

    def __call__(self, addresses: list[int], device: torch.device) -> Any:
        """Run one.

        Args:
            addresses: of its tensors and lists; those of what it makes are added.
            device: of them.
        """
        number = device.index or 0
        if device.type == "cuda" and number != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(addresses, device)
        made = [memory.made() for memory in self.memory]
        addresses += [t.data_ptr() for t in made]
        for launch in self.launches:
            launch(addresses, number)
        returned, kind = self.results
        return kind(made[:returned])


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Sees what a call does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nor here
        self.made: list[Tensor] = []
        #: Addresses of zeros.
        self.zeros: set[int | None] = set()
        #: What is copied, and by the addresses of copies what they are of.
        self.constants: list[Tensor] = []
        self.copies: dict[int | None, Tensor] = {}
        self.started: list[tuple[Any, tuple[int, ...], list[Any]]] = []
        self.did_more = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS or func in _ZEROS:
            self.made.append(found)
            self.zeros |= {found.data_ptr()} if func in _ZEROS else set()
        elif func is _CLONE and self.constants and args[0] is self.constants[-1]:
            self.made.append(found)
            self.copies[found.data_ptr()] = args[0]
        elif not func.is_view:
            self.did_more = True
        return found

    def repeat(self, given: Sequence[Tensor | None], results: Any) -> Repeat | None:
        """How calls like this one are repeated, if they can be.

        Args:
            given: its tensors and lists.
            results: a tensor, or a list or tuple of tensors.
        """
        returned = [results] if isinstance(results, Tensor) else list(results)
        others = [t for t in self.made if all(t.data_ptr() != r.data_ptr() for r in returned)]
        own = {t.data_ptr() for t in self.made}
        if not all(t.data_ptr() in own for t in returned):
            return None  # a result that an earlier call made
        sources = [*given, *returned, *others]
        addresses = [t.data_ptr() for t in sources if t is not None and t.numel()]
        known = len(set(addresses)) == len(addresses)
        compiled = self.started and all(one is not None for one, *_ in self.started)
        if self.did_more or not compiled or not known or isinstance(results, Tensor):
            return None
        try:
            launches = [Bound.of(*seen, partial(_place, sources)) for seen in self.started]
        except _Unknown:
            return None
        made = [*returned, *others]
        memory = tuple(map(self._memory, made))
        if not all(one.is_whole for one in memory):
            return None
        return Repeat(memory, tuple(launches), (len(returned), type(results)))

    def _memory(self, made: Tensor) -> Memory:
        # Tensors without elements have no address that would tell them apart.
        address = made.data_ptr() if made.numel() else None
        return Memory.like(made, address in self.zeros, self.copies.get(address))


class _Unknown(Exception):
    """A tensor is neither given nor made, nor a part of such a one."""


def _place(sources: Sequence[Tensor | None], tensor: Tensor) -> tuple[int, int]:
    """Which of the sources a tensor is, or is a part of, and how far behind its start."""
    if not tensor.numel():
        return 0, 0  # nobody reads there
    start = tensor.data_ptr()
    for number, source in enumerate(sources):
        if source is not None and source.data_ptr() == start:
            return number, 0
    for number, source in enumerate(sources):
        if source is not None and source.is_contiguous():
            behind = start - source.data_ptr()
            if 0 < behind < source.numel() * source.element_size():
                return number, behind
    raise _Unknown

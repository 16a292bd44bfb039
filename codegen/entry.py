"""Entry: what a kernel takes, declared once.

The signature in its text, its launches and its compilation ahead of time read this declaration, and
values are given by name.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from sparse_compile.codegen.runtime.descriptors import placement
from sparse_compile.codegen.runtime.generated import fill, load_module

#: What Triton calls dtypes.
SHORT = {
    **{"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"},
    **{"int64": "i64", "int32": "i32", "int8": "i8", "uint8": "u8", "bool": "i1"},
}


class Kind(Enum):
    """What a parameter is, and so what Triton may compile for.

    Attributes:
        POINTER: to a tensor; kernels are compiled for addresses that are multiples of 16 bytes.
        LIST: to a tensor, and nothing is known of its address: a view into a vector of many.
        DESCRIPTOR: of the tiles of a tensor, for the copy engine.
        INTEGER: kernels are compiled for 1, and for multiples of 16.
        SIZE: an integer that compiles nothing: a new length must not.
        NUMBER: a float.
        CONSTANT: part of the program.
    """

    POINTER = "pointer"
    LIST = "list"
    DESCRIPTOR = "descriptor"
    INTEGER = "integer"
    SIZE = "size"
    NUMBER = "number"
    CONSTANT = "constant"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel.

    Attributes:
        name: in its text.
        kind: what it is.
        dtype: of itself, or of the tensor that it points to.
        assumed: ahead of time, what a constant is, or a number that an integer is a multiple of (1:
            it is one); None: nothing is known of an integer.
        block: shape of the tiles of a descriptor.
        tensor: what a descriptor describes, of four dimensions.
        radices: of the digits that the third of these is taken apart into; none if it is not.
        placed: whether a descriptor says how a tile lies in shared memory, as those of Gluon do.
    """

    name: str
    kind: Kind
    dtype: str = "int32"
    assumed: Any = None
    block: tuple[int, ...] = ()
    tensor: str = ""
    radices: tuple[int, ...] = ()
    placed: bool = False

    @property
    def text(self) -> str:
        """In the signature."""
        return f"{self.name}: tl.constexpr" if self.kind is Kind.CONSTANT else self.name

    @property
    def type(self) -> str:
        """What Triton calls its type, when compiling ahead of time."""
        short = SHORT[self.dtype]
        if self.kind is Kind.DESCRIPTOR:
            shape = ", ".join(map(str, self.block))
            place = f",{placement(self.block, self.dtype)!r}" if self.placed else ""
            return f"tensordesc<{short}[{shape}]{place}>"
        if self.is_constant:
            return "constexpr"
        return f"*{short}" if self.kind in (Kind.POINTER, Kind.LIST) else short

    @property
    def is_constant(self) -> bool:
        """Whether its value is part of the program that is compiled ahead of time."""
        return self.kind is Kind.CONSTANT or (self.kind is Kind.INTEGER and self.assumed == 1)

    @property
    def is_aligned(self) -> bool:
        """Whether it is a multiple of 16 when compiling ahead of time."""
        return self.kind is Kind.POINTER or (self.kind is Kind.INTEGER and self.assumed == 16)


#: Parameters that stand together in a signature.
Line = tuple[Parameter, ...]


def pointers(dtype: str, *names: str) -> Line:
    """Tensors of one dtype."""
    return tuple(Parameter(name, Kind.POINTER, dtype) for name in names)


def lists(*names: str, dtype: str = "int32") -> Line:
    """Tensors of which no alignment is known."""
    return tuple(Parameter(name, Kind.LIST, dtype) for name in names)


def integers(*names: str, assumed: int | None = 16) -> Line:
    """Integers that a kernel is compiled for, such as strides."""
    return tuple(Parameter(name, Kind.INTEGER, assumed=assumed) for name in names)


def strides(*tensors: str) -> tuple[Line, ...]:
    """The strides of batch, heads and tokens of each tensor [B, H, N, D]: a line for each."""
    return tuple(integers(*(f"{t.lower()}_stride_{axis}" for axis in "bhn")) for t in tensors)


def sizes(*names: str) -> Line:
    """Integers that a kernel is not compiled for, such as lengths."""
    return tuple(Parameter(name, Kind.SIZE) for name in names)


def number(name: str) -> Line:
    """A float."""
    return (Parameter(name, Kind.NUMBER, "float32"),)


def constants(**assumed: Any) -> tuple[Line, ...]:
    """Constants, with the values assumed ahead of time: a line for each."""
    return tuple((Parameter(name, Kind.CONSTANT, assumed=v),) for name, v in assumed.items())


def labelled(name: str, section: int) -> str:
    """The name of a kernel, with the section after the first."""
    return f"{name}, section {section}" if section else name


@dataclass(frozen=True)
class Entry:
    """A kernel of a module.

    Attributes:
        name: of its function.
        lines: its parameters, as the signature shows them; constants come last.
        options: what the compiler is told, ``num_warps`` and the like.
        tile: what a program holds at a time, for those who launch it.
        section: of the launches that share the function; a constant, if there are several.
        absent: names of parameters that the section has no use for; None is passed for them.
    """

    name: str
    lines: tuple[Line, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    tile: Any = None
    section: int = 0
    absent: frozenset[str] = frozenset()

    @functools.cached_property
    def parameters(self) -> Line:
        """All of them, in order."""
        return tuple(parameter for line in self.lines for parameter in line)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of the parameters, in order."""
        return tuple(parameter.name for parameter in self.parameters)

    def of_section(self, number: int, absent: frozenset[str]) -> Entry:
        """The same for a section, which is a constant of the kernel, if there are several."""
        lines = tuple(
            tuple(replace(p, assumed=number) if p.name == "SECTION" else p for p in line)
            for line in self.lines
        )
        return replace(self, lines=lines, section=number, absent=absent)

    @property
    def label(self) -> str:
        """Its name, with the section after the first."""
        return labelled(self.name, self.section)

    @property
    def signature(self) -> list[str]:
        """Lines of source, up to the body.

        >>> entry = Entry("sum", (pointers("float32", "X", "Y"), sizes("n"), *constants(TILE=8)))
        >>> print(*entry.signature, sep=chr(10))
        @triton.jit(do_not_specialize=["n"])
        def sum(
            X, Y,
            n,
            TILE: tl.constexpr,
        ):
        """
        # The parameters whose values compile nothing.
        plain = (p.name for p in self.parameters if p.kind in (Kind.LIST, Kind.SIZE))
        quoted = ", ".join(f'"{name}"' for name in plain)
        shown = [", ".join(p.text for p in line) + "," for line in self.lines if line]
        wrapped = [row for line in shown for row in textwrap.wrap(line, 96)]
        head = f"@triton.jit(do_not_specialize=[{quoted}])"
        return [head, f"def {self.name}(", *(f"    {row}" for row in wrapped), "):"]

    def text(self, template: str, **holes: str | list[str]) -> str:
        """Source of the kernel: the template with its holes filled; ``$SIGNATURE`` is first."""
        return fill(template, SIGNATURE=self.signature, **holes)

    def ordered(self, values: Mapping[str, Any]) -> list[Any]:
        """The values of the parameters in their order; values of others are left out."""
        try:
            return [values[name] for name in self.names]
        except KeyError:
            missing = [name for name in self.names if name not in values]
            raise TypeError(f"{self.name} was not given {', '.join(missing)}") from None


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.

    Attributes:
        registers: per thread.
        spills: bytes of local memory per thread; 0 when everything fits in registers.
        shared: bytes of shared memory per program.
        ptx: its assembly.
    """

    registers: int
    spills: int
    shared: int
    ptx: str


@dataclass(frozen=True)
class Kernel:
    """Generated source, and the kernels in it.

    Attributes:
        name: of the module.
        source: its text; empty for a module that was written by hand, which ``functions`` holds.
        entries: its kernels, one for each launch.
        functions: by name, where there is no source.
        resources: of each entry by its label, where it was compiled ahead of time.
        beside: other modules with kernels for the same.
    """

    name: str
    source: str
    entries: tuple[Entry, ...]
    functions: Mapping[str, Any] = field(default_factory=dict)
    resources: Mapping[str, Resources] = field(default_factory=dict)
    beside: tuple[Kernel, ...] = ()

    def entry(self, label: str) -> Entry:
        """One of its entries."""
        return next(entry for entry in self.entries if entry.label == label)

    def function(self, entry: Entry) -> Any:
        """What ``triton.jit`` made; loads the module."""
        if not self.source:
            return self.functions[entry.name]
        return getattr(load_module(self.name, self.source), entry.name)

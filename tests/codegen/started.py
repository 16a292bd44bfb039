"""What is done on the host: kernels that only note what they are started with, and operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_compile.codegen import attend, repeated
from sparse_compile.codegen.generators import executor
from sparse_compile.codegen.runtime import direct
from sparse_compile.codegen.runtime.launch import Launcher
from sparse_compile.codegen.triton import calls
from tests.handed_in import worklists_on_the_cpu

Started = list[tuple[tuple[int, ...], list[Any]]]


class Kernel:
    """What Triton compiled, which only notes what it is started with."""

    def __init__(self, notes: Started) -> None:
        self.notes = notes

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.notes.append((grid, list(arguments)))


@contextmanager
def noting(workers: int = 8) -> Iterator[Started]:
    """Within it kernels are started for tensors on the CPU, and calls are repeated there."""
    notes: Started = []

    def launched(self: Launcher, grid: tuple[int, ...], arguments: Sequence[Any]) -> Kernel:
        plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        notes.append(((*grid, 1, 1)[:3], plain))
        return Kernel(notes)

    with pytest.MonkeyPatch.context() as patch, worklists_on_the_cpu(workers):
        patch.setattr(Launcher, "launched", launched)
        patch.setattr(attend, "executor", lambda family, device: executor(family, "cuda"))
        patch.setattr(repeated, "DEVICES", ("cpu",))
        patch.setattr(direct, "_KNOWN", ())  # nothing here has what a C function takes
        calls.forget()
        yield notes
        calls.forget()


class Operations(TorchDispatchMode):
    """Counts what torch does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def is_address(argument: Any) -> bool:
    """Whether what a kernel was started with is where a tensor is."""
    return isinstance(argument, int) and argument > 1 << 32

"""The generated forward kernel with clocks: when each program began, when it ended, and where."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen.entry import Entry, Kernel, pointers
from sparse_compile.codegen.runtime.launch import Launcher

_SIGNATURE, _KERNEL = "def forward(", "@triton.jit"
_START = ["CLOCK_START = tl.extra.cuda.globaltimer()"]
_END = [
    "CLOCK_END = tl.extra.cuda.globaltimer()",
    "CLOCKS += tl.program_id(0).to(tl.int64) * 3",
    "tl.store(CLOCKS, CLOCK_START)",
    "tl.store(CLOCKS + 1, CLOCK_END)",
    "tl.store(CLOCKS + 2, tl.extra.cuda.smid().to(tl.int64))",
]


def clocked(source: str) -> str:
    """The source of a module of kernels, ``forward`` writing its clocks.

    Its new first parameter CLOCKS is int64 [programs, 3]: start and end in nanoseconds, and the
    number of the multiprocessor.
    """
    lines = source.splitlines()
    assert lines.count(_SIGNATURE) == 1, "there is one kernel called forward, over several lines"
    begin = lines.index(_SIGNATURE)
    docstring = next(i for i in range(begin, len(lines)) if lines[i].startswith('    """'))
    assert lines[docstring - 1] == "):", "the docstring stands right after the signature"
    assert lines[docstring].count('"""') == 2, "the docstring fits one line"
    end = next(i for i in range(docstring, len(lines)) if lines[i].startswith(_KERNEL))
    body = lines[docstring + 1 : end]
    assert not any("return" in line.split() for line in body), "forward runs to its last line"
    while not body[-1].strip():
        body.pop()
    return "\n".join(
        [
            *lines[: begin + 1],
            "    CLOCKS,",
            *lines[begin + 1 : docstring + 1],
            *(f"    {line}" for line in _START),
            *body,
            *(f"    {line}" for line in _END),
            "",
            "",
            *lines[end:],
            "",
        ]
    )


@dataclass
class Recorder:
    """The clocks of every launch of ``forward`` since the last :meth:`take`."""

    launches: list[Tensor] = dataclasses.field(default_factory=list)

    def take(self) -> list[Tensor]:
        """int64 [programs, 3] of each launch, on the CPU."""
        torch.cuda.synchronize()
        launches, self.launches = self.launches, []
        return [clocks.cpu() for clocks in launches]


class _Forward(Launcher):
    """The launcher of ``forward``; the kernel gets the clocks without asking."""

    def __init__(self, kernel: Kernel, entry: Entry, recorder: Recorder) -> None:
        super().__init__(kernel, entry)
        self.recorder = recorder

    def launched(self, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
        assert all(size == 1 for size in grid[1:]), "programs are numbered along one axis"
        device = arguments[self.first_tensor].device
        clocks = torch.zeros(grid[0], 3, dtype=torch.int64, device=device)
        self.recorder.launches.append(clocks)
        # What it returned would be launched again without clocks.
        super().launched(grid, [clocks, *arguments])


def clocked_kernel(kernel: Kernel) -> tuple[Kernel, Entry]:
    """The module with clocks, and its entry ``forward``."""
    forward = kernel.entry("forward")
    entry = dataclasses.replace(forward, lines=(pointers("int64", "CLOCKS"), *forward.lines))
    return Kernel(f"{kernel.name}_clocked", clocked(kernel.source), (entry,)), entry


@contextlib.contextmanager
def instrumented() -> Iterator[Recorder]:
    """Within it the executor runs kernels with clocks."""
    from sparse_compile.codegen.triton import calls
    from sparse_compile.codegen.triton.blocks.source import kernel_of

    original, recorder = calls.kernels_of, Recorder()

    @functools.lru_cache(maxsize=1024)
    def kernels_of(spec: Any) -> Any:
        launchers, (kernel, _) = original(spec), clocked_kernel(kernel_of(spec))
        return {
            label: _Forward(kernel, launcher.entry, recorder)
            if launcher.entry.name == "forward"
            else launcher
            for label, launcher in launchers.items()
        }

    calls.kernels_of = kernels_of
    calls.forget()
    try:
        yield recorder
    finally:
        calls.kernels_of = original
        calls.forget()

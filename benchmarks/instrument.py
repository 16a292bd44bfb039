"""The generated forward kernel with clocks: when each program began, when it ended, and where."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class _Forward:
    """Stands for the launcher of ``forward``; the kernel gets the clocks without asking."""

    launcher: Launcher
    recorder: Recorder

    def __call__(
        self,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        constants: Sequence[Any],
        options: dict[str, Any],
    ) -> None:
        assert all(size == 1 for size in grid[1:]), "programs are numbered along one axis"
        clocks = torch.zeros(grid[0], 3, dtype=torch.int64, device=arguments[0].device)
        self.recorder.launches.append(clocks)
        self.launcher(grid, [clocks, *arguments], constants, options)


@contextlib.contextmanager
def instrumented() -> Iterator[Recorder]:
    """Within it the executor runs kernels with clocks."""
    from sparse_compile.codegen.runtime import cache
    from sparse_compile.codegen.triton.blocks import executor
    from sparse_compile.codegen.triton.blocks.source import kernel_source

    original, recorder = executor.kernels_of, Recorder()

    def kernels_of(spec: Any) -> Any:
        module = cache.load_module(f"{spec.name}_clocked", clocked(kernel_source(spec)))
        kernels = original(spec)
        clocked_forward = _Forward(Launcher(module.forward), recorder)
        launchers = {**kernels.launchers, "forward": clocked_forward}
        return dataclasses.replace(kernels, launchers=launchers)

    executor.kernels_of = kernels_of
    _forget(executor, keep=original)
    try:
        yield recorder
    finally:
        executor.kernels_of = original
        _forget(executor, keep=original)


def _forget(module: Any, keep: Any) -> None:
    """Empty the caches of a module that may hold what ``kernels_of`` gave."""
    for value in vars(module).values():
        if hasattr(value, "cache_clear") and value is not keep:
            value.cache_clear()

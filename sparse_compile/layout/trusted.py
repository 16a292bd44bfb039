"""Whether generated kernels list the blocks that the CPU lists: tried once, on a small problem.

A layout with a wrong block gives wrong results that look right. On an H200, kernels that computed
``max(low, -high, 0)`` for ``|x| <= 0`` listed blocks as if ``-high`` were not there, though in
Triton's interpreter the same kernels agree with the CPU. That form is no longer generated
(:mod:`sparse_compile.layout.canonical`), and all masks of the tests are listed rightly there now;
but why it went wrong is not known. So before the kernels of a mask are trusted on a device, their
lists are compared with those of the CPU; where they differ, the CPU makes the layouts of that mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_compile.layout.block_layout import BlockLayout
from sparse_compile.layout.build import counted_layout
from sparse_compile.layout.builders import BUILDERS
from sparse_compile.layout.superset import Problem, static_layout
from sparse_compile.spec.view import Order

#: Tried with at most so many blocks a side, the last one ragged (more than two spans of the
#: kernels), and with so many batch entries and heads.
_BLOCKS, _MEMBERS = 300, 2

_TRUSTED: dict[tuple[Any, ...], bool] = {}


def device_layout(problem: Problem, tables: Sequence[Tensor], device: torch.device) -> BlockLayout:
    """The layout of a problem, by kernels on its device if they are right, else by the CPU.

    The host may wait for the number of blocks.
    """
    key = problem.text, problem.q, problem.kv, problem.sizes, device
    trusted = _TRUSTED.get(key)
    if trusted is None:
        trusted = _TRUSTED[key] = _agrees(problem, tables, device)
        if not trusted:
            warnings.warn(
                f"sparse_compile: on {device} the generated kernels do not list the blocks of "
                f"{problem.mask} rightly, so the CPU lists them. Report this as a bug.",
                stacklevel=2,
            )
    if trusted:
        return _by_kernels(problem, tables, device)
    return _by_cpu(problem, tables).to(device)


def _agrees(problem: Problem, tables: Sequence[Tensor], device: torch.device) -> bool:
    small = replace(
        problem,
        n_q=_small(problem.q, problem.n_q),
        n_kv=_small(problem.kv, problem.n_kv),
        batches=min(problem.batches, _MEMBERS),
        heads=min(problem.heads, _MEMBERS),
    )
    found, wanted = _by_kernels(small, tables, device), _by_cpu(small, tables)
    return all(
        torch.equal(mine.cpu(), its)
        for c in range(small.classes)
        for lists, expected in ((found.rows, wanted.rows), (found.cols, wanted.cols))
        for mine, its in zip(lists.entries(c), expected.entries(c), strict=True)
    )


def _small(order: Order, n: int) -> int:
    """A length of two and a half boxes along the first digit, or of _BLOCKS blocks if longer."""
    tokens = max(5 * order.box[0] * order.strides[0] // 2, _BLOCKS * order.block)
    return min(n, tokens - 3)


def _by_kernels(problem: Problem, tables: Sequence[Tensor], device: torch.device) -> BlockLayout:
    builder = BUILDERS.get(device)
    assert builder is not None, device
    return builder.layout(problem, tables, device)


def _by_cpu(problem: Problem, tables: Sequence[Tensor]) -> BlockLayout:
    if problem.is_static:
        return static_layout(problem, torch.device("cpu"))
    return counted_layout(problem, [table.cpu() for table in tables])

"""What the kernels of selections share: a mask that they evaluate themselves, and their launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from sparse_compile.codegen.entry import Kernel
from sparse_compile.codegen.runtime.launch import Launcher, current, launchers_of
from sparse_compile.codegen.triton.layout import source
from sparse_compile.codegen.triton.layout.key import Key
from sparse_compile.codegen.triton.layout.text import DIVISIONS
from sparse_compile.selection.visible import Visible
from sparse_compile.spec.view import natural


def key_of(visible: Visible, run_q: int, run_kv: int) -> Key:
    """What the text of a printable mask is made for, in runs of so many queries and keys."""
    return Key.of(visible.mask, visible.sizes, natural(run_q), natural(run_kv))


def verdict_source(key: Key) -> list[str]:
    """The functions ``digits_of_q``, ``digits_of_kv``, ``verdict``, and what they call."""
    sides = source.sides(key)
    return [DIVISIONS, "\n\n", *sides, source.verdict_text(key)]


def verdict_lines(key: Key, q: str, kv: str, runs: tuple[str, str] = ("1", "1")) -> list[str]:
    """Lines that compute ``must`` and ``may``, of the blocks ``q`` and ``kv`` of either side.

    Or of ``runs`` of blocks from those on.
    """
    of_q, of_kv = key.ends("q"), key.ends("kv")
    given = ", ".join([*of_q, *of_kv, "0, 0, 0, 0, n_q, n_kv", *key.sizes])
    return [
        f"{', '.join(of_q)}, q_whole = digits_of_q({q}, n_q, {runs[0]})",
        f"{', '.join(of_kv)}, kv_whole = digits_of_kv({kv}, n_kv, {runs[1]})",
        f"must, may = verdict({given})",
    ]


@functools.lru_cache(maxsize=1024)
def _launcher(generate: Callable[[Any], Kernel], spec: Hashable) -> Launcher:
    """The one kernel of a module, loaded once."""
    (found,) = launchers_of(generate(spec)).values()
    return found


def launch(
    generate: Callable[[Any], Kernel],
    spec: Hashable,
    device: torch.device,
    grid: tuple[int, ...],
    values: Mapping[str, Any],
) -> None:
    """Launch the kernel that is generated for a spec on a device."""
    with current(device):
        _launcher(generate, spec)(grid, values)

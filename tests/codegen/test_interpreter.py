"""Kernels are interpreted and compiled in one process, in either order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.interpreter import interpreting


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def row_sums(X, OUT, N: tl.constexpr):
    row = tl.program_id(0)
    x = tl.load(X + row * N + tl.arange(0, N))
    tl.store(OUT + row, _twice(tl.sum(tl.where(x > 0, x, 0.0), 0)))


def interpreted() -> None:
    x, out = torch.randn(3, 8), torch.empty(3)
    with interpreting():
        row_sums[(3,)](x, out, 8)
    torch.testing.assert_close(out, 2 * x.relu().sum(1))


def ptx(kernel: object) -> str:
    signature = {"X": "*fp32", "OUT": "*fp32", "N": "constexpr"}
    source = ASTSource(kernel, signature, {"N": 8}, {})
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])


def test_one_process_interprets_and_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [(home, name) for home in (tl, tl.core, tl.math, tl.tensor) for name in vars(home)]
    before = [getattr(*place) for place in places]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "first"))
    first = ptx(row_sums)
    interpreted()
    assert all(getattr(*place) is value for place, value in zip(places, before, strict=True))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "second"))
    assert ptx(row_sums) == first
    interpreted()


def test_a_fault_in_a_kernel_leaves_the_language_as_it_was() -> None:
    before = dict(vars(tl.core))
    with interpreting(), pytest.raises(Exception, match="has no attribute"):
        row_sums[(3,)](torch.randn(3, 8), "not a tensor", 8)
    assert all(getattr(tl.core, name) is value for name, value in before.items())


def test_launches_are_compiled_outside_of_it() -> None:
    with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
        _twice(1)

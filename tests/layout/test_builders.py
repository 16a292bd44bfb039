"""Kernels are handed in: layouts and selections know none, and say so where they need one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sparse_compile.errors import SparseCompileError
from sparse_compile.layout.builders import ByDevice


def test_a_gpu_needs_something_handed_in() -> None:
    builders: ByDevice[str] = ByDevice("builds layouts")
    assert builders.get(torch.device("cpu")) is None
    with pytest.raises(SparseCompileError, match=r"builds layouts on cuda:1.*sparse_compile\.ops"):
        builders.get(torch.device("cuda", 1))
    builders.give("cuda", "kernels")
    assert builders.get(torch.device("cuda", 1)) == "kernels"
    assert builders.get(torch.device("cpu")) is None


def test_layouts_and_selections_import_no_kernels_until_a_pattern_asks() -> None:
    program = (
        "import sys, torch\n"
        "from sparse_compile.layout.builders import BUILDERS as layouts\n"
        "from sparse_compile.selection.builders import BUILDERS as selections\n"
        "import sparse_compile.layout.from_dense, sparse_compile.selection.split\n"
        "assert not any(name.startswith('sparse_compile.codegen') for name in sys.modules)\n"
        "from sparse_compile import patterns as P\n"
        "P.Causal().layout(16, 16)\n"
        "gpu = torch.device('cuda')\n"
        "assert layouts.get(gpu) and selections.get(gpu)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

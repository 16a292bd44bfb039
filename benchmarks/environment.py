"""What a result was measured with: hardware, versions, commit."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, str]:
    """GPU or CPU, versions of torch, triton and Python, and the commit measured."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "gpu": gpu,
        "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": os.environ.get("SPARSE_COMPILE_COMMIT") or _commit(),
    }


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a command was given, but for where it writes: paths are those of one machine."""
    return {name: value for name, value in vars(args).items() if name != "out"}


def write_json(path: str | Path, rows: list[dict[str, Any]], **extra: Any) -> None:
    """Write a result file: environment, then rows."""
    content = {"environment": environment(), **extra, "rows": rows}
    Path(path).write_text(json.dumps(content, indent=1) + "\n")

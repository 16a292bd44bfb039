"""All models of the survey."""

from __future__ import annotations

from benchmarks.models.entry import Entry
from benchmarks.models.of_others import DIFFUSERS, TIMM
from benchmarks.models.of_transformers import TRANSFORMERS

ENTRIES: dict[str, Entry] = {one.name: one for one in (*TRANSFORMERS, *TIMM, *DIFFUSERS)}


def version(package: str) -> str | None:
    """Of a package; None if it, or what it needs itself, cannot be imported."""
    try:
        if package == "timm":
            import timm as module
        elif package == "diffusers":
            import diffusers as module
        else:
            import transformers as module
    except (ImportError, RuntimeError):  # RuntimeError: torchvision, built for another torch
        return None
    return str(module.__version__)

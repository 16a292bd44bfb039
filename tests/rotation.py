"""Tests that take turns: of those that repeat one meaning at many shapes, a part per commit.

``pytest`` without paths is what everybody runs on the whole, CI too. What it leaves out of a file
runs with the next commits; ``pytest tests``, and any path or name given, leaves out nothing.
"""

from __future__ import annotations

import functools
import subprocess
import zlib
from pathlib import Path

#: Into how many parts the tests of files are divided.
PARTS: dict[str, int] = {
    # Kernels compiled ahead of time.
    "test_choose_aot": 5,
    "test_selected_source": 12,
    "test_triton_source": 12,
    "test_windows_aot": 4,
    # Kernels in Triton's interpreter.
    "interpreted_choose": 2,
    "interpreted_device_layout": 3,
    "interpreted_kernels": 2,
    "interpreted_listed": 4,
    "interpreted_operators": 5,
    "interpreted_scores": 8,
    "interpreted_selected": 3,
    "interpreted_union": 2,
    # Models, and programs through torch.compile.
    "test_annotations": 3,
    "test_aten_graphs": 2,
    "test_backend": 8,
    "test_benchmarks": 2,
    "test_compiled": 4,
    "test_dense_masks": 7,
    "test_direct": 2,
    "test_expand": 8,
    "test_expand_flex": 8,
    "test_find_models": 3,
    "test_flex": 6,
    "test_held_layouts": 6,
    "test_idioms_biases": 4,
    "test_idioms_dropout": 3,
    "test_idioms_empty_rows": 3,
    "test_idioms_masks": 4,
    "test_idioms_scores": 3,
    "test_interface": 16,
    "test_lift_constants": 2,
    "test_lift_cost": 2,
    "test_lift_models": 2,
    "test_lift_realise": 2,
    "test_longt5": 9,
    "test_mask_writes": 5,
    "test_memory_of_models": 3,
    "test_models": 9,
    "test_nsa": 2,
    "test_opaque_calls": 6,
    "test_pattern_attention": 2,
    "test_recognise_checkpointed": 7,
    "test_recognise_own_scores": 3,
    "test_recognise_selected_models": 8,
    "test_recognise_threshold": 6,
    "test_recompiles": 12,
    "test_score_models": 5,
    "test_selecting_annotations": 3,
    "test_sparsify": 16,
    "test_train_gate": 3,
    "test_whole_models": 8,
    # Many cases of one meaning.
    "test_device_layout": 2,
    "test_find_eager": 2,
    "test_lift_idioms": 3,
    "test_lift_random": 3,
    "test_lift_trees_and_blocks": 4,
    "test_recognise_selected": 2,
    "test_recognise_selected_spellings": 2,
    "test_score_programs": 8,
    "test_scored": 2,
    "test_split_views": 6,
}


@functools.cache
def commits() -> int:
    """How many there are: the same number in every process of a run."""
    count = ["git", "rev-list", "--count", "HEAD"]
    root = Path(__file__).parents[1]
    done = subprocess.run(count, cwd=root, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0


def has_turn(file: str, name: str, turn: int) -> bool:
    """Whether a test runs now.

    Args:
        file: name of its file, without ``.py``.
        name: of the test, with its parameters.
        turn: which part of each file runs, modulo how many it has.
    """
    parts = PARTS.get(file, 1)
    return zlib.crc32(f"{file}::{name}".encode()) % parts == turn % parts

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
    "test_choose_aot": 8,
    "test_selected_source": 18,
    "test_triton_source": 18,
    "test_short": 2,
    "test_windows_aot": 6,
    # Kernels in Triton's interpreter.
    "interpreted_choose": 3,
    "interpreted_device_layout": 5,
    "interpreted_kernels": 3,
    "interpreted_listed": 6,
    "interpreted_operators": 8,
    "interpreted_scores": 12,
    "interpreted_selected": 5,
    "interpreted_short": 6,
    "interpreted_union": 3,
    # Models, and programs through torch.compile.
    "test_annotations": 5,
    "test_aten_graphs": 3,
    "test_backend": 12,
    "test_benchmarks": 3,
    "test_compiled": 6,
    "test_dense_masks": 11,
    "test_direct": 3,
    "test_expand": 12,
    "test_expand_flex": 12,
    "test_find_models": 5,
    "test_flex": 9,
    "test_held_layouts": 9,
    "test_idioms_biases": 6,
    "test_idioms_dropout": 3,
    "test_idioms_empty_rows": 3,
    "test_idioms_masks": 6,
    "test_idioms_scores": 5,
    "test_interface": 24,
    "test_lift_constants": 3,
    "test_lift_cost": 3,
    "test_lift_models": 2,
    "test_lift_realise": 3,
    "test_longt5": 14,
    "test_mask_writes": 8,
    "test_memory_of_models": 5,
    "test_models": 14,
    "test_nsa": 3,
    "test_opaque_calls": 9,
    "test_pattern_attention": 3,
    "test_recognise_checkpointed": 11,
    "test_recognise_own_scores": 5,
    "test_recognise_selected_models": 12,
    "test_recognise_threshold": 9,
    "test_recompiles": 20,
    "test_score_models": 8,
    "test_selecting_annotations": 5,
    "test_sparsify": 24,
    "test_train_gate": 5,
    "test_whole_models": 16,
    # Many cases of one meaning.
    "test_device_layout": 3,
    "test_find_eager": 3,
    "test_lift_idioms": 5,
    "test_lift_random": 5,
    "test_lift_trees_and_blocks": 6,
    "test_recognise_selected": 2,
    "test_recognise_selected_spellings": 3,
    "test_score_programs": 12,
    "test_scored": 3,
    "test_split_views": 9,
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

"""Which tests are in the fast tier, and which of those that compile go through Inductor.

The fast tier, ``pytest -m "not slow"``, is what everybody runs before a commit, in under 90 s.

It holds every test of most files, and a sample of the files whose tests compile or interpret: what
those test is many times the same meaning on other shapes. A test is in the sample or not by its own
name, so a tier does not change with what else is collected.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

#: Of the tests of these files about one in so many is in the fast tier; of those with 0, none.
ONE_IN = {
    # Kernels in Triton's interpreter: 1 to 6 s each.
    "interpreted_choose": 24,
    "interpreted_dense": 6,
    "interpreted_device_layout": 24,
    "interpreted_kernels": 8,
    "interpreted_listed": 4,
    "interpreted_operators": 4,
    "interpreted_scores": 4,
    "interpreted_selected": 6,
    "interpreted_union": 8,
    "interpreted_windows": 10,
    # Kernels compiled ahead of time: 1 to 10 s each.
    "test_choose_aot": 12,
    "test_device_layout": 4,
    "test_from_dense": 4,
    "test_selected_source": 8,
    "test_triton_source": 4,
    "test_windows_aot": 6,
    # Models through torch.compile: 0.5 to 2 s each, those of transformers more.
    "test_annotations": 4,
    "test_backend": 6,
    "test_compiled": 16,
    "test_composition": 3,
    "test_dense_masks": 8,
    "test_find_block_scores": 6,
    "test_find_indexer": 8,
    "test_find_models": 0,
    "test_lift_models": 0,
    "test_memory_of_models": 0,
    "test_models": 0,
    "test_score_models": 0,
    "test_recognise_checkpointed": 3,
    "test_recognise_own_scores": 12,
    "test_recognise_selected": 8,
    "test_recognise_selected_models": 0,
    "test_recognise_selected_spellings": 10,
    "test_recognise_shared_index": 6,
    "test_recognise_threshold": 16,
    "test_selecting_annotations": 12,
    "test_sharing": 4,
    # Whole programs: benchmarks, commands, processes of their own.
    "test_cli": 6,
    "test_demo": 0,
    "test_selected_peers": 0,
    "test_train_gate": 6,
}


#: What the backend makes of a graph, Inductor gets. What Inductor then does takes most of the time
#: of a test, most of it a C++ compiler's, and is the same many times over. So of the tests of these
#: files one in so many goes through it, those of other files do all; AOTAutograd runs what remains
#: of the graph as it is in the others. ``pytest --inductor all`` sends all tests through Inductor.
INDUCTOR_ONE_IN = {
    "test_annotations": 16,
    "test_backend": 4,
    "test_compiled": 8,
    "test_composition": 4,
    "test_dense_masks": 16,
    "test_direct": 8,
    "test_direct_scores": 4,
    "test_models": 4,
    "test_pattern_attention": 16,
    "test_recognise_own_scores": 16,
    "test_recognise_selected": 8,
    "test_recognise_selected_spellings": 8,
    "test_recognise_shared_index": 4,
    "test_recognise_threshold": 16,
    "test_score_models": 16,
    "test_selecting_annotations": 8,
    "test_sharing": 8,
}


def is_slow(file: str, name: str) -> bool:
    """Whether a test is left out of the fast tier.

    Args:
        file: name of its file, without ``.py``.
        name: of the test, with its parameters.
    """
    return not _is_sampled(ONE_IN, file, name)


def is_through_inductor(file: str, name: str) -> bool:
    """Whether what a test compiles goes through Inductor; arguments as for :func:`is_slow`."""
    return _is_sampled(INDUCTOR_ONE_IN, file, name)


def _is_sampled(one_in: Mapping[str, int], file: str, name: str) -> bool:
    """Whether a test is in the sample: by its own name, whatever else is collected."""
    n = one_in.get(file, 1)
    return n > 0 and zlib.crc32(name.encode()) % n == 0

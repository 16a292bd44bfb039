"""Which tests are in the fast tier, and which of those that compile go through Inductor.

The fast tier, ``pytest -m "not slow"``, is what everybody runs before a commit, in about a minute
and a half.

It holds every test of the files that take a second, and a sample of the others, a second of each:
what those test is many times the same meaning on other shapes. A test is in the sample or not by
its own name, so a tier does not change with what else is collected. Whole models of
transformers, and files that other files are a cheaper sample of, are not in it at all.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

#: Of the tests of these files about one in so many is in the fast tier; of those with 0, none.
ONE_IN = {
    # Kernels in Triton's interpreter: 1 to 6 s each.
    "interpreted_choose": 12,
    "interpreted_dense": 3,
    "interpreted_device_layout": 10,
    "interpreted_kernels": 0,
    "interpreted_listed": 0,
    "interpreted_operators": 29,
    "interpreted_scores": 10,
    "interpreted_selected": 13,
    "interpreted_short": 15,
    "interpreted_union": 0,
    "interpreted_windows": 4,
    # Kernels compiled ahead of time: 1 to 10 s each.
    "test_choose_aot": 0,
    "test_device_layout": 5,
    "test_from_dense": 9,
    "test_selected_source": 40,
    "test_short": 4,
    "test_triton_source": 12,
    "test_windows_aot": 0,
    # Models through torch.compile: 0.5 to 2 s each, those of transformers more.
    "test_annotations": 10,
    "test_aten_graphs": 5,
    "test_backend": 12,
    "test_compiled": 26,
    "test_composition": 4,
    "test_dense_masks": 19,
    "test_expand": 11,
    "test_expand_flex": 8,
    "test_find_block_scores": 7,
    "test_find_indexer": 10,
    "test_find_models": 0,
    "test_found": 4,
    "test_fuzz": 0,
    "test_fuzzer": 4,
    "test_idioms_biases": 12,
    "test_idioms_dropout": 12,
    "test_idioms_empty_rows": 12,
    "test_idioms_masks": 12,
    "test_idioms_scores": 12,
    "test_lift_models": 0,
    "test_memory_of_models": 0,
    "test_models": 0,
    "test_recompiles": 0,
    "test_opaque_calls": 3,
    "test_models_table": 0,
    "test_score_models": 0,
    "test_recognise_checkpointed": 0,
    "test_recognise_own_scores": 26,
    "test_recognise_selected": 15,
    "test_recognise_selected_models": 0,
    "test_recognise_selected_spellings": 7,
    "test_recognise_shared_index": 12,
    "test_recognise_threshold": 32,
    "test_selecting_annotations": 13,
    "test_sharing": 5,
    "test_longt5": 9,
    "test_sparsify": 9,
    # Whole programs: benchmarks, commands, processes of their own.
    "test_cli": 3,
    "test_demo": 2,
    "test_selected_peers": 3,
    "test_train_gate": 2,
    "test_whole_models": 4,
    # Many cases of one meaning: 0.05 to 1 s each.
    "test_algebra": 3,
    "test_bad_input": 8,
    "test_benchmarks": 5,
    "test_build": 4,
    "test_builders": 2,
    "test_called": 10,
    "test_cost": 7,
    "test_cpu_executor": 7,
    "test_cpu_plan": 4,
    "test_cpu_views": 3,
    "test_digits": 2,
    "test_direct": 6,
    "test_doctests": 10,
    "test_evaluate": 5,
    "test_find_eager": 9,
    "test_flex": 12,
    "test_find_near_misses": 6,
    "test_fences": 3,
    "test_find_scores": 2,
    "test_find_sdpa": 5,
    "test_gate": 3,
    "test_grids": 2,
    "test_held_layouts": 8,
    "test_hidden_values": 9,
    "test_interchange": 2,
    "test_interface": 25,
    "test_intervals": 3,
    "test_latent": 17,
    "test_lift_check": 3,
    "test_lift_cost": 3,
    "test_lift_data_masks": 9,
    "test_lift_empty_rows": 6,
    "test_lift_idioms": 20,
    "test_lift_random": 7,
    "test_lift_realise": 5,
    "test_lift_simplify": 2,
    "test_lift_slice": 4,
    "test_lift_trees_and_blocks": 12,
    "test_listed": 2,
    "test_mask_buffers": 6,
    "test_mask_writes": 14,
    "test_no_keys": 4,
    "test_nsa": 4,
    "test_operator_results": 5,
    "test_ops": 2,
    "test_packed": 3,
    "test_pattern_attention": 14,
    "test_pipeline": 2,
    "test_pooled": 3,
    "test_report": 3,
    "test_schedule": 4,
    "test_score_programs": 2,
    "test_scored": 9,
    "test_scored_values": 5,
    "test_selected_attention": 4,
    "test_sequences": 3,
    "test_soft_gate": 4,
    "test_split_views": 10,
    "test_stays_dense": 6,
    "test_trees": 3,
    "test_triton_predicate": 3,
    "test_visited": 2,
}


#: What the backend makes of a graph, Inductor gets. What Inductor then does takes most of the time
#: of a test, most of it a C++ compiler's, and is the same many times over. So of the tests of these
#: files one in so many goes through it, and those that are marked ``inductor``, with 0 these alone;
#: those of other files do all. AOTAutograd runs what remains of the graph as it is in the others.
#: ``pytest --inductor all`` sends all tests through Inductor.
INDUCTOR_ONE_IN = {
    "test_annotations": 16,
    "test_backend": 4,
    "test_bad_input": 0,
    "test_benchmarks": 0,
    "test_compiled": 8,
    "test_composition": 4,
    "test_cost": 0,
    "test_dense_masks": 16,
    "test_demo": 0,
    "test_direct": 8,
    "test_direct_scores": 4,
    "test_flex": 0,
    "test_held_layouts": 0,
    "test_interface": 0,
    "test_lift_trees_and_blocks": 16,
    "test_idioms_biases": 0,
    "test_idioms_dropout": 0,
    "test_idioms_empty_rows": 0,
    "test_idioms_masks": 0,
    "test_lift_data_masks": 0,
    "test_idioms_scores": 0,
    "test_models": 0,
    "test_opaque_calls": 3,
    "test_nsa": 0,
    "test_pattern_attention": 16,
    "test_readme": 0,
    "test_recognise_own_scores": 16,
    "test_recognise_selected": 8,
    "test_recognise_selected_spellings": 8,
    "test_recognise_shared_index": 4,
    "test_recognise_threshold": 16,
    "test_score_models": 16,
    "test_selecting_annotations": 8,
    "test_sharing": 8,
    "test_longt5": 0,
    "test_sparsify": 0,
    "test_whole_models": 0,
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

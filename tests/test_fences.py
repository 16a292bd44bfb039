"""What is relied upon of torch beyond its documented API, one test for each fence."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def test_compile_fx_takes_a_dynamo_graph_and_patches() -> None:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    parameters = list(inspect.signature(compile_fx).parameters)
    assert parameters[:2] == ["model_", "example_inputs_"]
    assert "config_patches" in parameters
    assert list_mode_options("max-autotune")


@pytest.mark.parametrize("allowed", [True, False])
def test_fresh_size_works_where_dynamo_forbids_dynamic_output_shapes(allowed: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    import sparse_compile.ops  # noqa: F401  # registers the operators

    env = ShapeEnv(allow_dynamic_output_shape_ops=allowed)
    with FakeTensorMode(shape_env=env) as mode, env.ignore_fresh_unbacked_symbols():
        table = mode.from_tensor(torch.ones(1, 8, dtype=torch.bool))
        args = ([table], [], 1, 1, 8, 8, "{}", torch.device("cpu"))
        packed = torch.ops.sparse_compile.block_layout(*args)
    assert isinstance(packed.shape[0], torch.SymInt)
    assert packed.shape[0] >= 0

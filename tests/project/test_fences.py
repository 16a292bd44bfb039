"""What is relied upon of torch beyond its documented API, one test for each fence."""

from __future__ import annotations

import inspect
import operator
from types import SimpleNamespace

import pytest
import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.traceback import annotate

import sparse_compile
from sparse_compile.api import annotate as annotate_module
from sparse_compile.codegen.repeated import Bound
from sparse_compile.codegen.runtime.descriptors import described_tiles
from sparse_compile.expr import KV, B, MaskExpr
from sparse_compile.expr import table as lookup
from sparse_compile.flex.record import record
from sparse_compile.spec import AttentionSpec


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
        padding = MaskExpr(sympy.Ne(lookup(0)(B, KV), 0), ("bool",))
        text = AttentionSpec(padding, block_q=16, block_kv=16).text
        args = ([table], "[]", [], 1, 1, 8, 8, 1, text, torch.device("cpu"), [])
        (packed,) = torch.ops.sparse_compile.layout(*args)
    assert isinstance(packed.shape[0], torch.SymInt)
    assert packed.shape[0] >= 0


def test_dynamo_traces_what_writes_down_functions() -> None:
    """flex/record.py: a TorchFunctionMode sees all that is done with numbers, lookups by them and
    comparisons with sizes that are known by name only among it; the text is a constant.
    """
    torch._dynamo.reset()
    ids, texts = torch.zeros(2, 9, dtype=torch.int64), []
    note = torch.compiler.assume_constant_result(lambda text: texts.append(text) or len(text))

    def write(ids: torch.Tensor, n: int) -> torch.Tensor:
        def mask(b: object, h: object, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            return (ids[b, q] == ids[b][kv]) & (kv != n) & (q * 2 > kv)

        found = record(mask, None, torch.device("cpu"))
        return ids + note(found.text) + sum(found.sizes)

    write(ids, 3)
    compiled = torch.compile(write, backend="eager", fullgraph=True)
    for n in (3, 4, 5):
        compiled(ids, n)
    plain, static, dynamic = texts
    assert static == plain
    assert dynamic == plain.replace("ne(v3,3)", "ne(v3,s0)")


def test_annotations_reach_the_captured_graph() -> None:
    """``torch.fx.traceback.annotate`` is experimental; api/annotate.py relies on this:
    its values are in ``meta["custom"]``, the innermost context wins, other keys are kept.
    """
    seen = []

    def backend(gm: torch.fx.GraphModule, _: list[object]) -> object:
        calls = [node for node in gm.graph.nodes if node.op == "call_function"]
        seen.extend(node.meta.get("custom") for node in calls)
        return gm

    def run(x: torch.Tensor) -> torch.Tensor:
        with annotate({"ours": "a", "other": "c"}):
            x = torch.sin(x)
            with annotate({"ours": "b"}):
                x = torch.cos(x)
            x = torch.tan(x)
        return torch.exp(x)

    torch.compile(run, backend=backend, fullgraph=True)(torch.ones(3))
    outer = {"ours": "a", "other": "c"}
    assert seen == [outer, {**outer, "ours": "b"}, outer, None]


def test_frames_that_were_not_captured_are_known() -> None:
    """The callback for new frames is set there, and only there. Without the function that tells,
    annotations work as before, but nothing warns when a graph break separates one.
    """
    seen = []

    def uncaptured() -> None:
        if not torch.compiler.is_dynamo_compiling():
            seen.append(callable(annotate_module._frame_callback()))
        with annotate({"ours": "a"}):
            torch._dynamo.graph_break()

    uncaptured()
    torch.compile(uncaptured, backend="eager")()
    torch.compiler.disable(uncaptured)()
    assert seen == [False, True, False]


@pytest.mark.parametrize("specialize", [True, False])
def test_launches_tell_apart_what_triton_compiles_for(specialize: bool) -> None:
    """launch.py reuses a compiled kernel where all arguments are of equal kinds."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import native_specialize_impl
    from triton.tools.tensor_descriptor import TensorDescriptor

    from sparse_compile.codegen.runtime.launch import signature

    integers = [0, 1, 2, 8, 15, 16, 17, 32, 4096, -16, -1, 2**31 - 1, 2**31, 2**32 + 1, -(2**31)]
    numbers = torch.zeros(64)
    tensors = [numbers, numbers[1:], numbers[4:], numbers.bool(), numbers.bool()[3:], numbers.int()]
    matrices = [torch.zeros(64, 64), torch.zeros(128, 64), torch.zeros(64, 64, dtype=torch.half)]
    descriptors = [
        TensorDescriptor(m, list(m.shape), list(m.stride()), [rows, 64])
        for m in matrices
        for rows in (32, 64)
    ]
    descriptors += [
        described_tiles(m, list(m.shape), list(m.stride()), (rows, 64), placed)
        for m, dtype in zip(matrices, ("float32", "float32", "float16"), strict=True)
        for rows in (32, 64)
        for placed in ("", dtype)
    ]
    values = [*integers, *tensors, None, True, False, 0.5, 1.0, *descriptors]
    found: dict[object, object] = {}
    for value in values:
        theirs = native_specialize_impl(CUDABackend, value, False, specialize, specialize)
        assert found.setdefault(signature([value])[0], theirs) == theirs, value


def test_declared_ranges_are_attributes_of_inputs() -> None:
    """passes/decide/pick.py makes no guards in graphs that are to hold for a range."""
    x, y = torch.ones(4, 4), torch.ones(4, 4)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
    torch._dynamo.mark_dynamic(y, 0)
    assert [(one.min, one.max) for one in x._dynamo_dynamic_range] == [(2, 64)]
    assert [(one.min, one.max) for one in y._dynamo_dynamic_range] == [(None, None)]


def test_plans_are_made_outside_of_tracing() -> None:
    """``_disable_current_modes`` is private; ops/untraced.py relies on this."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    from sparse_compile.ops.untraced import untraced

    with FakeTensorMode():
        assert isinstance(torch.ones(2), FakeTensor)
        assert untraced(lambda: float(torch.ones(2).sum()))() == 2.0


def test_what_torch_gave_up_on_is_known() -> None:
    """The metrics of ``torch._dynamo.utils`` are private; inspect/skipped.py relies on this."""
    from sparse_compile.inspect.skipped import frames_skipped

    def looping(x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x + 1
            torch._dynamo.graph_break()
        return x

    with frames_skipped() as skipped:
        torch.compile(looping, backend="eager")(torch.ones(2))
    assert any(frame.startswith("looping, test_fences.py:") for frame in skipped)


@pytest.mark.parametrize("named", [True, False])
def test_aot_autograd_lifts_named_buffers_of_a_captured_graph(named: bool) -> None:
    """rewrite/lists.py names its buffers as Dynamo names those that it finds itself."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.source import ConstantSource

    lowered: list[torch.fx.GraphModule] = []

    def lower(graph: torch.fx.GraphModule, _: object) -> object:
        lowered.append(graph)
        return graph.forward

    def backend(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        (add,) = gm.graph.find_nodes(op="call_function", target=operator.add)
        gm.register_buffer("held", torch.full([3], 5.0), persistent=False)
        if named:
            gm._param_name_to_source["held"] = ConstantSource("held")
        with gm.graph.inserting_before(add):
            held = gm.graph.get_attr("held")
        add.args = add.args[0], held
        gm.recompile()
        return aot_autograd(fw_compiler=lower)(gm, inputs)

    run = torch.compile(lambda x: x + 1, backend=backend)
    if not named:
        with pytest.raises(Exception, match="held not found in param_name_to_source"):
            run(torch.ones(3))
        return
    assert torch.equal(run(torch.ones(3)), torch.full([3], 6.0))
    (graph,) = lowered
    assert len(graph.graph.find_nodes(op="placeholder")) == 2
    assert not graph.graph.find_nodes(op="get_attr")


def test_inductors_code_calls_the_functions_behind_operators() -> None:
    """Its registry of what is written for an operator is private; backend.py relies on this."""
    from torch._inductor.utils import run_and_get_code

    from sparse_compile import patterns as P

    def attend(q: torch.Tensor) -> torch.Tensor:
        return sparse_compile.attention(q, q, q, P.SlidingWindow(3))

    compiled = torch.compile(attend, backend="sparse_compile")
    q = torch.randn(1, 2, 32, 16)
    found, (code,) = run_and_get_code(compiled, q)
    assert "= torch.ops.sparse_compile.attention.run(" in code
    torch.testing.assert_close(found, attend(q))


def test_the_launcher_of_triton_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """direct.py gives the C function under it, in these versions, just what the launcher gives."""
    import triton
    from triton.backends.nvidia import driver

    from sparse_compile.codegen.runtime import direct

    if not triton.__version__.startswith(direct._KNOWN):
        pytest.skip("the launcher of this version is called as it is")
    seen: list[tuple[object, ...]] = []
    signature = {0: "*fp32", 1: "tensordesc<fp32[8, 8]>", 2: "i32"}
    run = SimpleNamespace(
        launch=driver.wrap_handle_tensordesc(lambda *given: seen.append(given), signature, None),
        launch_cooperative_grid=False,
        launch_pdl=True,
        **dict.fromkeys(("global_scratch_size", "profile_scratch_size"), 0),
    )
    compiled = SimpleNamespace(
        run=run, function=11, packed_metadata=(4, 1, 0), metadata=SimpleNamespace()
    )
    with_streams = SimpleNamespace(get_current_stream=lambda device: 70 + device)
    monkeypatch.setattr(type(triton.runtime.driver), "active", with_streams)

    tensor = torch.zeros(8, 8)
    descriptor = described_tiles(tensor, [8, 8], [8, 1], (8, 8))
    # As CudaLauncher.__call__ does, whose hooks and scratch there are none of.
    before = (3, 1, 1, 71, 11, False, True, None, None, (4, 1, 0), None, None, None)
    assert len(before) == driver._BASE_ARGS_FORMAT_LEN
    run.launch(*before, tensor.data_ptr(), descriptor, 7)
    places = {tensor.data_ptr(): (0, 0)}
    bound = Bound.of(compiled, (3, 1, 1), [tensor, descriptor, 7], lambda t: places[t.data_ptr()])
    bound([tensor.data_ptr()], device=1)
    launched, repeated = ([getattr(a, "data_ptr", lambda a=a: a)() for a in one] for one in seen)
    assert repeated == launched


def test_the_code_of_multi_head_attention_can_be_run_under_a_mode() -> None:
    """expand/python_mha.py runs a copy of it, which does not hand itself over to the mode."""
    import torch.nn.functional as F
    from torch.overrides import TorchFunctionMode

    from sparse_compile.passes.expand.python_mha import ASKS, as_python

    called: list[str] = []

    class Watching(TorchFunctionMode):
        def __torch_function__(
            self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
        ) -> object:
            called.append(getattr(func, "__name__", ""))
            assert callable(func)
            return func(*args, **(kwargs or {}))  # type: ignore[arg-type]

    module = torch.nn.MultiheadAttention(8, 2)
    x, bias = torch.randn(5, 1, 8), module.in_proj_bias
    projections = module.in_proj_weight, bias, None, None, False, 0.0, module.out_proj.weight
    arguments = (x, x, x, 8, 2, *projections, module.out_proj.bias)
    assert ASKS in F.multi_head_attention_forward.__code__.co_names
    with Watching():
        F.multi_head_attention_forward(*arguments)
        assert called == ["multi_head_attention_forward"]
        found, _ = as_python()(*arguments)
    assert {"linear", "softmax", "bmm"} <= set(called)
    assert torch.equal(found, module(x, x, x)[0])


def test_a_block_mask_is_a_tuple_that_starts_with_its_lists() -> None:
    """expand/flex.py and expand/blocks.py read it, and the arguments of the operator, by place."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return q >= kv

    mask = create_block_mask(causal, None, None, 32, 32, device="cpu", BLOCK_SIZE=(16, 8))
    items = mask.as_tuple()
    assert items[:2] == (32, 32)
    lists = mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices
    assert all(item is one for item, one in zip(items[2:6], lists, strict=True))
    assert items[-3:] == (16, 8, causal)

    seen: list[tuple[object, ...]] = []

    def backend(gm: torch.fx.GraphModule, _: list[object]) -> object:
        seen.extend(node.args for node in gm.graph.nodes if node.name == "flex_attention")
        return gm

    q = torch.randn(1, 1, 32, 8)
    torch.compile(flex_attention, backend=backend)(q, q, q, block_mask=mask, scale=0.5)
    ((*operands, score_mod, blocks, scale, _, score_given, mask_given),) = seen
    assert len(operands) == 3
    assert len(blocks) == len(items)
    assert (scale, score_given, mask_given) == (0.5, (), ())
    assert [str(one.target)[:5] for one in (score_mod, blocks[-1])] == ["score", "mask_"]

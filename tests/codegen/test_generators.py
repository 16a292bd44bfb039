"""Generators as plug-ins: who serves a spec, who refuses, early and late."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from sparse_compile.codegen import generators as module
from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.entry import Kernel
from sparse_compile.codegen.generators import Generators, ShapeNeed, block_shapes
from sparse_compile.codegen.runtime.launch import Refused
from sparse_compile.errors import NoKernel
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.layout.views.split_views import choose_views
from sparse_compile.spec import AttentionSpec, KernelSpec
from sparse_compile.spec.block_shape import BlockShape
from sparse_compile.spec.target import Target

SPEC = KernelSpec(AttentionSpec(MaskExpr(KV <= Q)), 64, 64, "bfloat16", "sm_90")


@dataclass
class Fake:
    """A generator that says what it is told to."""

    name: str
    reason: str = ""
    shapes: tuple[BlockShape, ...] = ()
    made: list[Any] = field(default_factory=list)

    def refusal(self, spec: Any) -> str:
        return self.reason

    def block_shapes(self, need: ShapeNeed) -> tuple[BlockShape, ...]:
        return self.shapes if need.target.arch == "sm_90" else ()

    def generate(self, spec: Any) -> Kernel:
        self.made.append(spec)
        return Kernel(f"{self.name}_kernel", "", ())


def test_the_first_that_does_not_refuse_serves_and_reasons_are_kept() -> None:
    first, second, third = Fake("gluon", "no Hopper here"), Fake("triton"), Fake("other")
    known = Generators([first, second, third])
    chosen = known.choose(SPEC)
    assert (chosen.generator, chosen.kernel.name) == ("triton", "triton_kernel")
    assert chosen.refused == (("gluon", "no Hopper here"),)
    assert known.choose(SPEC) is chosen
    assert (first.made, second.made, third.made) == ([], [SPEC], [])


def test_a_late_refusal_hands_over_to_the_next_for_good() -> None:
    known = Generators([Fake("gluon"), Fake("triton")])
    assert known.choose(SPEC).kernel.name == "gluon_kernel"
    known.refuse(SPEC, "forward: out of resource: shared memory")
    for _ in range(2):
        chosen = known.choose(SPEC)
        assert chosen.kernel.name == "triton_kernel"
        assert chosen.refused == (("gluon", "forward: out of resource: shared memory"),)


def test_where_all_refuse_the_error_says_why() -> None:
    known = Generators([Fake("gluon", "no Hopper here"), Fake("triton")])
    known.choose(SPEC)
    known.refuse(SPEC, "too many registers")
    with pytest.raises(NoKernel, match="gluon: no Hopper here; triton: too many registers"):
        known.choose(SPEC)


def test_generators_are_asked_for_block_shapes() -> None:
    wide = (BlockShape(128, 128),)
    known = Generators([Fake("gluon", shapes=wide), *module.generators().known])
    assert known.block_shapes(ShapeNeed(Target("cuda", "sm_90"))) == wide
    assert known.block_shapes(ShapeNeed(Target("cuda", "sm_80")))[0] == BlockShape(64, 64)
    assert known.block_shapes(ShapeNeed(Target("cpu", "interpreter"))) == (BlockShape(32, 32),)
    spec, _ = choose_views(MaskExpr(KV <= Q), ProblemShape(1, 1, 4096, 4096), shapes=wide)
    assert (spec.block_q, spec.block_kv) == (128, 128)
    on_cpu = block_shapes("cpu")
    spec, _ = choose_views(MaskExpr(KV <= Q), ProblemShape(1, 1, 4096, 4096), shapes=on_cpu)
    assert (spec.block_q, spec.block_kv) == (32, 32)


def test_an_executor_hands_over_where_a_kernel_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first generator's kernels are refused when they are launched; then the error says so."""
    from sparse_compile.codegen.triton import calls
    from sparse_compile.codegen.triton.blocks import executor
    from sparse_compile.layout import build_views

    triton = next(one for one in module.generators().known if one.name == "triton")
    known = Generators([triton])
    monkeypatch.setattr(calls, "generators", lambda: known)
    calls.forget()

    def refuse(self: Any, grid: Any, arguments: Any) -> Any:
        raise Refused(f"{self.entry.name}: out of resource")

    monkeypatch.setattr("sparse_compile.codegen.runtime.launch.Launcher.launched", refuse)
    q = torch.randn(1, 1, 64, 16)
    spec = AttentionSpec(MaskExpr(KV <= Q + 1), block_q=32, block_kv=32)
    layout = build_views(spec, ProblemShape(1, 1, 64, 64))
    with pytest.raises(NoKernel, match="triton: forward: out of resource"):
        executor.forward(AttentionCall(q, q, q, [], [], [], 1.0, spec, layout=layout))
    calls.forget()

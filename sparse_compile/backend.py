"""The backend: what ``torch.compile(model, backend="sparse_compile")`` runs on each graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch.fx import GraphModule

from sparse_compile.ops.registered import OPERATORS, RUN
from sparse_compile.options import Options
from sparse_compile.passes import pipeline


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Rewrite the attention of a captured graph to block-sparse kernels; Inductor does the rest.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs.
        options: fields of :class:`sparse_compile.options.Options`.
        mode: as for Inductor, such as ``"max-autotune"``.

    Raises:
        UnknownOption, BadOption: before anything is compiled.
        BadPattern, RestrictionFailed: an annotation does not fit, or cannot be honoured.
    """
    parsed = Options.parse(options)
    pipeline.run(gm, example_inputs, parsed)
    return compile_with_inductor(gm, example_inputs, mode=mode, inductor_options=parsed.inductor)


def compile_with_inductor(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None,
    inductor_options: Mapping[str, Any],
) -> Callable[..., Any]:
    """AOTAutograd and Inductor over a Dynamo graph, as ``backend="inductor"`` runs them.

    It is the fence around entry points that are stable in practice but not documented;
    ``tests/project/test_fences.py`` says what is relied upon.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    _call_without_dispatcher()
    patches = dict(list_mode_options(mode)) if mode else {}
    patches.update({name.replace("-", "_"): value for name, value in inductor_options.items()})
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return cast("Callable[..., Any]", compiled)


@functools.cache
def _call_without_dispatcher() -> None:
    """Have Inductor's code call the functions behind our operators, not the operators.

    What it compiles runs below autograd, on plain tensors: the layers between an operator and its
    function would find nothing to do, and take longer than many kernels. A version of torch that
    has no such registry calls the operators.
    """
    try:
        from torch._inductor.codegen.custom_extern_kernel_codegen import (
            CUSTOM_EXTERN_KERNEL_CODEGEN,
            CustomCodegen,
        )
    except ImportError:
        return

    def write(node: Any, writeline: Callable[[str], None]) -> None:
        arguments = ", ".join([*node.codegen_args(), *node.codegen_kwargs()])
        function = f"{node.python_kernel_name.rpartition('.')[0]}.{RUN}"
        writeline(f"{node.get_name()} = {function}({arguments})")

    for name in OPERATORS:
        operator = f"torch.ops.sparse_compile.{name}.default"
        CUSTOM_EXTERN_KERNEL_CODEGEN[operator] = CustomCodegen(python=write)

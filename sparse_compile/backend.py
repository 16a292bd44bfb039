"""The backend: what ``torch.compile(model, backend="sparse_compile")`` runs on each graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch.fx import GraphModule

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

    patches = dict(list_mode_options(mode)) if mode else {}
    patches.update({name.replace("-", "_"): value for name, value in inductor_options.items()})
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return cast("Callable[..., Any]", compiled)

"""The fence around Inductor's entry points, which are stable in practice but not documented.

Everything that is not a documented API of torch and concerns Inductor goes through here;
``tests/project/test_fences.py`` says what is relied upon.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch.fx import GraphModule


def compile_with_inductor(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None,
    inductor_options: Mapping[str, Any],
) -> Callable[..., Any]:
    """AOTAutograd and Inductor over a Dynamo graph, as ``backend="inductor"`` runs them."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = dict(list_mode_options(mode)) if mode else {}
    patches.update({name.replace("-", "_"): value for name, value in inductor_options.items()})
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return cast("Callable[..., Any]", compiled)

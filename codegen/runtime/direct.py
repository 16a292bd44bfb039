"""Start a compiled kernel without what Triton's launcher does in Python at each launch.

The launcher of Triton 3.6 goes through all arguments of a kernel that takes descriptors, and has
the descriptors encoded anew. What it hands to the C function below it is known once the grid is,
but for the stream, the addresses and the encoded descriptors. This is the fence around that
function; of other versions the launcher itself is called, and so it is while a profiler has hooks
in it. ``tests/project/test_fences.py`` and ``tests/gpu`` say what is relied upon.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from sparse_compile.codegen.runtime.descriptors import is_descriptor

#: Versions of Triton whose launcher is known.
_KNOWN = ("3.6.",)
#: Where the stream stands among the arguments of the C function.
STREAM = 3


@dataclass(frozen=True, eq=False)
class Start:
    """How a kernel is started on a grid.

    Attributes:
        run: starts it.
        arguments: of ``run``; those that differ between launches are filled in.
        places: where the arguments of the kernel stand among them.
        stream: of a device, which stands at :data:`STREAM`; None where ``run`` asks for it.
        encode: for each descriptor, what is filled in for it.
    """

    run: Callable[..., Any]
    arguments: list[Any]
    places: list[int]
    stream: Callable[[int], int] | None
    encode: list[Callable[[Any], Any]]


def start_of(compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any]) -> Start:
    """For a kernel that Triton compiled.

    Args:
        compiled: the kernel.
        grid: programs along three dimensions.
        arguments: of a launch, in order.
    """
    descriptors = [one for one in arguments if is_descriptor(one)]
    # What is filled in is not kept: it holds the memory of one call.
    kept = [None if isinstance(a, torch.Tensor) or is_descriptor(a) else a for a in arguments]
    if not _is_known() or compiled.run.global_scratch_size or compiled.run.profile_scratch_size:
        itself: list[Callable[[Any], Any]] = [lambda descriptor: descriptor] * len(descriptors)
        whole = list(range(len(kept)))
        return Start(compiled[grid], kept, whole, None, itself)
    from triton.backends.nvidia.driver import make_tensordesc_arg
    from triton.runtime import driver

    launcher = compiled.run
    run = launcher.launch
    if descriptors:
        run = inspect.getclosurevars(run).nonlocals["launcher"]
    modes = launcher.launch_cooperative_grid, launcher.launch_pdl
    # No memory for scratch; no hooks, and nothing for them.
    all_of_it: list[Any] = [*grid, 0, compiled.function, *modes, None, None]
    all_of_it += [compiled.packed_metadata, None, None, None]
    metas = iter(getattr(compiled.metadata, "tensordesc_meta", None) or [None] * len(descriptors))
    places: list[int] = []
    encode: list[Callable[[Any], Any]] = []
    for argument, constant in zip(arguments, kept, strict=True):
        places.append(len(all_of_it))
        if is_descriptor(argument):
            meta = next(metas)
            all_of_it += [None, *make_tensordesc_arg(argument, meta)[1:]]
            encode.append(partial(_encoded, make_tensordesc_arg, meta))
        else:
            all_of_it.append(constant)
    return Start(run, all_of_it, places, driver.active.get_current_stream, encode)


def _encoded(make: Callable[..., list[Any]], meta: Any, descriptor: Any) -> Any:
    """What stands for a descriptor, before its shape and strides."""
    return make(descriptor, meta)[0]


def _is_known() -> bool:
    import triton

    if not triton.__version__.startswith(_KNOWN):
        return False
    runtime = triton.knobs.runtime
    return not (runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def allocator(device: torch.device) -> Callable[..., torch.Tensor]:
    """A function of shape, strides and dtype that makes a tensor, with anything in it.

    For the current CUDA device it is what Inductor's code calls, where torch has that.
    """
    if device.type == "cuda":
        found = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
        if found is not None:
            return cast("Callable[..., torch.Tensor]", found)
    return lambda shape, strides, dtype: torch.empty_strided(
        shape, strides, dtype=dtype, device=device
    )

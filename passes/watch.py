"""Watching what a function does to the tensors it is given, by running it on fake ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sparse_compile.ops.fresh_size import unbound_sizes


class Unwatched(Exception):
    """A function could not be run on fake tensors."""


def watch(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    fake_mode: Any,
) -> tuple[set[int], bool]:
    """Run a function of a captured graph once more, as Dynamo did and AOTAutograd will.

    Args:
        function: what to run.
        args, kwargs: its arguments, tensors being fake.
        fake_mode: of these.

    Returns:
        the storages that it wrote to, and whether it drew random numbers.

    Raises:
        Unwatched: it cannot be run.
    """
    recorder = _Recorder()
    try:
        with contextlib.ExitStack() as stack:
            for context in (torch.no_grad(), fake_mode, unbound_sizes(fake_mode), recorder):
                stack.enter_context(context)
            # Views of the same memory, so that a change of shape does not reach the originals.
            given = tree_map_only(torch.Tensor, torch.Tensor.detach, (tuple(args), dict(kwargs)))
            function(*given[0], **given[1])
    except Exception as error:  # The user's function: anything can be raised.
        raise Unwatched(str(error)) from error
    return recorder.written, recorder.random


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which storages operators write to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: set[int] = set()
        self.random = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        for name, position in written_arguments(func).items():
            value = kwargs.get(name, args[position] if 0 <= position < len(args) else None)
            for storage in storages(value):
                if storage is None:
                    raise Unwatched("a tensor without memory is written to")
                self.written.add(storage)
        self.random |= draws(func)
        return func(*args, **kwargs)


def written_arguments(op: torch._ops.OpOverload) -> dict[str, int]:
    """Names and positions of the arguments that an operator writes to; -1 for keywords."""
    arguments = op._schema.arguments
    return {
        argument.name: -1 if argument.kwarg_only else position
        for position, argument in enumerate(arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write)
        # Batch norms do not say that they keep statistics.
        or argument.name in ("running_mean", "running_var")
    }


def draws(op: torch._ops.OpOverload) -> bool:
    """Whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in op.tags


def storages(value: Any) -> Iterator[int | None]:
    """Identities of the storages of a value; None for a tensor that has none to show."""
    for tensor in tree_leaves(value):
        if not isinstance(tensor, torch.Tensor):
            continue
        try:
            # Two Python objects may stand for one storage; its address is what identifies it. Fake
            # tensors have no data address, so this is the address of the storage record.
            yield int(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):
            yield None

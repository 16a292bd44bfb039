"""Host descriptors of tiles, for the copy engine: those of Triton, and those of Gluon.

Both are Triton's own classes without their checks, which operands are made to pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch


@functools.lru_cache(maxsize=1)
def _plain() -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    class Unchecked(TensorDescriptor):  # type: ignore[misc]  # triton has no types
        def __post_init__(self) -> None:
            pass

    return Unchecked


@functools.lru_cache(maxsize=1)
def _placed() -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    class UncheckedPlaced(TensorDescriptor):  # type: ignore[misc]  # triton has no types
        def __post_init__(self) -> None:
            pass

    return UncheckedPlaced


@functools.lru_cache(maxsize=64)
def placement(block: tuple[int, ...], dtype: str) -> Any:
    """How a tile of a shape lies in shared memory; ``dtype`` is a name as ``"bfloat16"``."""
    from triton.experimental.gluon import language

    return language.NVMMASharedLayout.get_default_for(list(block), getattr(language, dtype))


def described_tiles(
    base: Any,
    shape: Sequence[int],
    strides: Sequence[int],
    block: tuple[int, ...],
    placed: str = "",
) -> Any:
    """The descriptor of the tiles of a tensor.

    Args:
        base: the tensor.
        shape, strides: as it is described.
        block: shape of a tile.
        placed: name of the dtype of a descriptor that says how tiles lie in shared memory.
    """
    if placed:
        return _placed()(base, shape, strides, list(block), placement(block, placed))
    return _plain()(base, shape, strides, list(block))


def is_descriptor(argument: Any) -> bool:
    """Whether an argument of a kernel is one."""
    # A tensor has no such attribute; most arguments are numbers and tensors.
    return not isinstance(argument, torch.Tensor) and hasattr(argument, "block_shape")


def remaker(descriptor: Any) -> Callable[[Any], Any]:
    """Makes the same descriptor of another base; it does not keep this one's."""
    kind: Any = type(descriptor)
    rest = {f.name: getattr(descriptor, f.name) for f in fields(descriptor) if f.name != "base"}
    return functools.partial(kind, **rest)

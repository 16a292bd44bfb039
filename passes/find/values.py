"""What a node holds: shape, dtype, constants. Reads ``example_value`` and adds no guard."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_symbols, statically_known_true


def tensor(value: object) -> torch.Tensor | None:
    """The fake tensor of a node that holds one tensor, else None."""
    example = value.meta.get("example_value") if isinstance(value, Node) else None
    return example if isinstance(example, torch.Tensor) else None


def shape(node: Node) -> tuple[Any, ...]:
    """The sizes of a tensor node, ints or SymInts; () for anything else."""
    example = tensor(node)
    return () if example is None else tuple(example.shape)


def dtype(value: object) -> torch.dtype | None:
    """The dtype of a tensor node, None for anything else."""
    example = tensor(value)
    return None if example is None else example.dtype


def same_device(a: object, b: object) -> bool:
    """Whether two nodes hold tensors of one device."""
    first, second = tensor(a), tensor(b)
    return first is not None and second is not None and first.device == second.device


def widens(before: object, after: object) -> bool:
    """Whether the dtype of a tensor node holds every value of that of another."""
    have, want = dtype(before), dtype(after)
    return have is not None and want is not None and torch.promote_types(have, want) == want


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal."""
    return bool(statically_known_true(a == b))


def differ(a: Any, b: Any) -> bool:
    """Whether two sizes are known to differ. Symbols the program itself equated may be neither."""
    return bool(statically_known_true(a != b))


def same_shape(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two shapes are known to be equal."""
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def is_float(node: object) -> bool:
    """Whether a node holds a floating tensor."""
    example = tensor(node)
    return example is not None and example.dtype.is_floating_point


def is_scalar(value: object) -> bool:
    """Whether an argument is one number: a Python number, a symbol or a 0-dim tensor."""
    if isinstance(value, Node):
        example = value.meta.get("example_value")
        if isinstance(example, torch.Tensor):
            return example.ndim == 0
        return isinstance(example, (int, float, torch.SymInt, torch.SymFloat))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(value: object) -> float | None:
    """The number an argument is known to be, None if it is only known at run time."""
    if isinstance(value, Node):
        value = value.meta.get("example_value")
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return None
    if isinstance(value, (torch.SymInt, torch.SymFloat)) and free_symbols(value):
        return None
    return float(value)


def short_dtype(dtype: torch.dtype | None) -> str:
    """The dtype's name without ``torch.``; in words where there is none."""
    return "an unknown dtype" if dtype is None else str(dtype).removeprefix("torch.")

"""Run-time data that a pattern holds: tensors, or tuples of integers in their place.

Nothing here imports torch: whoever passes a tensor has done so.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from typing import Any

import sympy

from sparse_compile.patterns.checks import bad

#: Tensors with more entries than this print as their dtype and shape.
_SPELLED_IN_FULL = 64


def is_tensor(value: Any) -> bool:
    """Whether ``value`` is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def frozen(where: str, value: Any, dims: Iterable[int], instead: str, least: int = 0) -> Any:
    """A tensor as it is; anything else as nested tuples of ints.

    Args:
        where: what it is, for errors.
        value: a tensor of integers or bools, or nested sequences of them.
        dims: how many axes it may have.
        instead: what to write where it has others, or an axis of less than ``least`` entries.
        least: see ``instead``.

    >>> frozen("ids", [[0, 0], [0, 1]], (1, 2), "Write [tokens] or [batch, tokens].")
    ((0, 0), (0, 1))
    """
    if not is_tensor(value):
        value = _as_tuples(where, value.tolist() if hasattr(value, "tolist") else value)
    elif value.is_floating_point() or value.is_complex():
        raise bad(f"{where} is a tensor of {value.dtype}", "Pass integers or bools.")
    shape = shape_of(value, where)
    # torch.compile knows no min() with a default.
    if len(shape) not in dims or any([n < least for n in shape]):
        raise bad(f"{where} has the sizes {list(shape)}", instead)
    return value


def _as_tuples(where: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_as_tuples(where, item) for item in value)
    if not isinstance(value, int):
        raise bad(f"{where} holds {value!r}", "Pass a tensor or a tuple of integers.")
    return int(value)


def tensors_of(value: Any) -> list[Any] | None:
    """The tensors among the parameters of a pattern of this library, or of its parts.

    None if it holds something else that its tables may read, such as a function.
    """
    if is_tensor(value):
        return [value]
    if value is None or isinstance(value, (int, float, str)):
        return []
    if type(value).__module__.startswith(__name__.rpartition(".")[0] + "."):
        value = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    if not isinstance(value, tuple):
        return None
    parts = [tensors_of(part) for part in value]
    return None if None in parts else [tensor for part in parts for tensor in part or ()]


def shape_of(value: Any, where: str = "data") -> tuple[int, ...]:
    """Sizes of a tensor or of nested tuples; ``where`` names it.

    >>> shape_of(((0, 0, 1), (0, 1, 1)))
    (2, 3)
    """
    if is_tensor(value):
        return tuple(value.shape)
    if not isinstance(value, tuple):
        return ()
    inner = {shape_of(item, where) for item in value}
    if len(inner) > 1:
        raise bad(f"{where} has rows of different lengths", "Give every row the same length.")
    return (len(value), *(inner.pop() if inner else ()))


def values_now(value: Any) -> Any:
    """Nested tuples of what is known without waiting for a device, else None."""
    if not is_tensor(value):
        return value
    return _as_tuples("data", value.tolist()) if _is_plain(value) else None


def _is_plain(tensor: Any) -> bool:
    return tensor.device.type == "cpu" and type(tensor).__name__ in ("Tensor", "Parameter")


def dtype_of(value: Any) -> str:
    """The dtype of the table that holds ``value``: ``bool``, ``int32`` or ``int64``."""
    if not is_tensor(value):
        return "int64"
    name = str(value.dtype).removeprefix("torch.")
    if name in ("bool", "int64"):
        return name
    return "int64" if name in ("uint32", "uint64") else "int32"


def key_of(value: Any) -> Any:
    """What tells this data from other data while a pattern that holds it is alive."""
    return id(value) if is_tensor(value) else value


def on_device(value: Any, dtype: str) -> Callable[..., Any]:
    """Makes the table of ``value``, see :data:`sparse_compile.patterns.base.TableMaker`."""

    def make(device: Any, n_q: int, n_kv: int, batch: int, heads: int) -> Any:
        import torch

        wanted = getattr(torch, dtype)
        if is_tensor(value):
            return value.detach().to(device=device, dtype=wanted)
        return torch.tensor(value, device=device, dtype=wanted)

    return make


def along(coordinate: sympy.Symbol, size: int) -> sympy.Expr:
    """The index of an axis of ``size`` entries, where one entry stands for all."""
    return sympy.Integer(0) if size == 1 else coordinate


def same(a: Any, b: Any) -> bool:
    """Whether two parameters are equal, tensors by identity or else by content."""
    if a is b:
        return True
    if is_tensor(a) and is_tensor(b):
        alike = a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
        return bool(alike and (a == b).all())
    return not is_tensor(a) and not is_tensor(b) and bool(a == b)


def spelled(value: Any) -> str:
    """A parameter as a Python expression; a long tensor as its dtype and shape.

    >>> import torch
    >>> spelled(torch.tensor([0, 0, 1])), spelled(torch.zeros(4096, dtype=torch.int32))
    ('tensor([0, 0, 1])', '<int32 tensor [4096]>')
    """
    if not is_tensor(value):
        return repr(value)
    name = str(value.dtype).removeprefix("torch.")
    if value.numel() > _SPELLED_IN_FULL or not _is_plain(value):
        return f"<{name} tensor {list(value.shape)}>"
    dtype = "" if name in ("bool", "int64") else f", dtype={name}"
    return f"tensor({value.tolist()}{dtype})"


class HoldsData:
    """Equality by value and a hash for patterns whose parameters may be tensors."""

    def _parameters(self: Any) -> list[Any]:
        return [getattr(self, parameter.name) for parameter in dataclasses.fields(self)]

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(map(same, self._parameters(), other._parameters()))

    def __hash__(self) -> int:
        # The content of a tensor may change; its shape does not.
        seen = (tuple(p.shape) if is_tensor(p) else p for p in self._parameters())
        return hash((type(self).__name__, *seen))

"""What a ``mask_mod`` or ``score_mod`` does with one pair, as text, and the tensors that it reads.

The function is called once, with the numbers of no pair in particular, and every function of torch
that is applied to them is written down. torch.compile traces all of this: it sees the constants of
the function and guards on them, its tensors become inputs of the graph, and sizes that it knows by
name only stay run-time numbers. So another mask of the same kind compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.overrides import TorchFunctionMode

from sparse_compile.errors import Inexpressible

#: Of a pair: the numbers that a function is called with, in this order. The first four are whole.
PLACES = ("b", "h", "q", "kv")
SCORE = "score"

_IN_PLACE = tuple(
    f"i{name}"
    for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul".split()
)
#: What may be asked of a number without knowing it.
_ASKED = (
    *("__get__", "size", "dim", "ndimension", "numel", "stride", "element_size", "get_device"),
    *("is_floating_point", "is_complex", "is_contiguous", "type", "__repr__", "__hash__"),
    "__format__",
)


class Recorded(NamedTuple):
    """A mask and what becomes of the scores, as written down.

    Attributes:
        text: a line for each tensor, with its dtype and shape; a line for each step, as
            ``v5 = lt(v2,v4) : torch.bool``; and one with the results. ``v0, v1, ...`` are earlier
            steps, ``t0, ...`` tensors and ``s0, ...`` numbers that are known in a call.
        tensors: what it reads.
        sizes: these numbers.
    """

    text: str
    tensors: tuple[Tensor, ...]
    sizes: tuple[int, ...]


def record(
    mask_mod: Callable[..., Any] | None,
    score_mod: Callable[..., Any] | None,
    device: torch.device,
) -> Recorded:
    """Write down both functions; ``device`` is where they would be called.

    Raises:
        Inexpressible: one asks for the value of a number, or does more than compute with numbers.
    """
    recorder = Recorder(device)
    mask = recorder.result_of(mask_mod, PLACES)
    score = recorder.result_of(score_mod, (SCORE, *PLACES))
    lines = [*recorder.described(), *recorder.steps, f"{mask};{score}"]
    return Recorded("\n".join(lines), tuple(recorder.tensors), tuple(recorder.sizes))


def given(tensor: Tensor, dtype: str, device: torch.device) -> Tensor:
    """A recorded tensor as it is read; one of a single number has one axis of one entry."""
    tensor = tensor.to(device=device, dtype=getattr(torch, dtype))
    if tensor.dim():
        return tensor
    # Not by reshape: what is made of constants alone AOTAutograd computes while it traces.
    return torch.zeros(1, dtype=tensor.dtype, device=device) + tensor


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _name_of(function: Any) -> str:
    return str(getattr(function, "__name__", function))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _shown(value: Any) -> str:
    return repr(value)


class Recorder(TorchFunctionMode):
    """Writes down what is done with the numbers of a pair.

    Attributes:
        steps: lines of text.
        tensors, sizes: what they read.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.steps: list[str] = []
        self.tensors: list[Tensor] = []
        self.sizes: list[int] = []
        # What the steps computed, so that it is known again. The values mean nothing.
        self._values: list[Tensor] = []
        self._places: dict[str, Tensor] = {}
        for name in (*PLACES, SCORE):
            whole = torch.int64 if name != SCORE else torch.float32
            self._places[name] = torch.ones((), dtype=whole, device=device)
            self._add(name, self._places[name])

    def result_of(self, function: Callable[..., Any] | None, names: Sequence[str]) -> str:
        """Call a function; the number of its result. Empty without a function."""
        if function is None:
            return ""
        places = [self._places[name] for name in names]
        with self:
            result = function(*places)
        if not isinstance(result, Tensor):
            raise Inexpressible(
                f"sparse_compile: {_role(names)} returns {type(result).__name__}, not a tensor. "
                "Return what is computed from its arguments."
            )
        return self._spelled(result)

    def described(self) -> list[str]:
        """A line for each tensor."""
        return [
            f"t{i} : {_shown(tensor.dtype)} : {self._spelled(tuple(tensor.shape))}"
            for i, tensor in enumerate(self.tensors)
        ]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._knows(args) and not self._knows(list(kwargs.values())):
            return func(*args, **kwargs)
        name = _name_of(func)
        _check_pure(name, kwargs)
        if name in ("__getitem__", "getitem"):
            return self._looked_up(args[0], args[1])
        value = func(*args, **kwargs)
        if not isinstance(value, Tensor):
            if name not in _ASKED:
                raise Inexpressible(_unknown_value(name))
            return value
        if self._number(value) < 0:
            _check_number(name, value)
            given = [self._spelled(arg) for arg in args]
            given += [f"{key}={self._spelled(arg)}" for key, arg in kwargs.items()]
            self._add(f"{name}({','.join(given)}) : {_shown(value.dtype)}", value)
        return value

    def _looked_up(self, table: Tensor, index: Any) -> Tensor:
        """An entry of a tensor; or what is left of it by the first of its indices."""
        whole = tuple(index) if isinstance(index, (tuple, list)) else (index,)
        for one in whole:
            if not isinstance(one, (int, Tensor)) or isinstance(one, bool):
                raise Inexpressible(
                    "sparse_compile: a mask_mod or score_mod takes a part of a tensor. Index it "
                    "by whole numbers only, or slice it before, outside of the function."
                )
        if len(whole) > table.dim():
            raise IndexError(
                f"sparse_compile: {len(whole)} indices for a tensor of {list(table.shape)}."
            )
        value = table.new_ones(table.shape[len(whole) :])
        self._add(
            f"getitem({self._spelled(table)},{self._spelled(whole)}) : {_shown(value.dtype)}", value
        )
        return value

    def _add(self, step: str, value: Tensor) -> None:
        self.steps.append(f"v{len(self._values)} = {step}")
        self._values.append(value)

    def _number(self, value: Tensor) -> int:
        for number, known in enumerate(self._values):
            if known is value:
                return number
        return -1

    def _knows(self, values: Sequence[Any]) -> bool:
        for value in values:
            if isinstance(value, Tensor):
                if self._number(value) >= 0:
                    return True
            elif isinstance(value, (tuple, list)) and self._knows(value):
                return True
        return False

    def _spelled(self, value: Any) -> str:
        if isinstance(value, Tensor):
            number = self._number(value)
            return f"v{number}" if number >= 0 else self._tensor(value)
        if isinstance(value, (tuple, list)):
            return "(" + "".join([self._spelled(one) + "," for one in value]) + ")"
        if isinstance(value, int) and not isinstance(value, bool):
            if has_static_value(value):
                return repr(value)
            self.sizes.append(value)
            return f"s{len(self.sizes) - 1}"
        if isinstance(value, float) and not has_static_value(value):
            # A float that torch.compile knows by name only: a tensor of one number.
            return self._tensor(torch.ones((), device=self._values[0].device) * value)
        shown: str = _shown(value)
        return shown

    def _tensor(self, value: Tensor) -> str:
        for number, known in enumerate(self.tensors):
            if known is value:
                return f"t{number}"
        self.tensors.append(value)
        return f"t{len(self.tensors) - 1}"


def _role(names: Sequence[str]) -> str:
    return "score_mod" if len(names) > len(PLACES) else "mask_mod"


def _check_pure(name: str, kwargs: dict[str, Any]) -> None:
    plain = name.strip("_") if name.startswith("__") else name
    if plain in _IN_PLACE or plain == "setitem" or (name.endswith("_") and plain == name):
        raise Inexpressible(
            f"sparse_compile: a mask_mod or score_mod changes a tensor in place ({plain}). Write "
            "x = x + y for x += y, and make tensors before, outside of the function."
        )
    if "out" in kwargs:
        raise Inexpressible(
            f"sparse_compile: a mask_mod or score_mod calls {plain} with out=. Leave it out."
        )


def _check_number(name: str, value: Tensor) -> None:
    if value.dim():
        raise Inexpressible(
            f"sparse_compile: in a mask_mod or score_mod {name.strip('_')} makes a tensor of "
            f"{list(value.shape)}. Compute with single numbers: index tensors by as many of b, h, "
            "q_idx and kv_idx as they have dimensions."
        )


def _unknown_value(name: str) -> str:
    return (
        f"sparse_compile: a mask_mod or score_mod asks for the value of a number "
        f"({name.strip('_')}), which differs from pair to pair. Write & for `and`, | for `or`, ~ "
        "for `not`, and torch.where(...) for `if`."
    )

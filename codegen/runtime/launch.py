"""Launch kernels with little work on the host.

Triton finds out at every launch how to specialise each argument, which takes longer than some
kernels run. What it looks at is known (whether integers are 1, multiples of 16 or over 32 bits,
whether pointers are aligned, and types), so a launch whose arguments look the same as before takes
the kernel compiled then. Versions of Triton that may look at more are asked every time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Versions whose rules are those of :func:`kind`; ``tests/project/test_fences.py`` compares them.
_KNOWN = ("3.6.", "3.7.", "3.8.", "3.9.")
_MOST = 1024
#: Dtypes of operands, as the names of modules spell them.
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Launcher:
    """A kernel of a generated module.

    Args:
        kernel: made by ``triton.jit``; its last parameters are the constants.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        constants: Sequence[Any],
        options: dict[str, Any],
    ) -> None:
        """Launch it on the current device.

        Args:
            grid: programs along up to three dimensions.
            arguments: in the order of the parameters, without the constants.
            constants: the values of the last parameters.
            options: how it is compiled; always the same for the same constants.
        """
        if not isinstance(arguments[0], Tensor) or not arguments[0].is_cuda or not _rules_known():
            self.kernel[grid](*arguments, *constants, **options)
            return
        key = arguments[0].device, *constants, *signature(arguments)
        known = self.compiled.get(key)
        if known is not None:
            known[(*grid, 1, 1)[:3]](*arguments, *constants)
            return
        if len(self.compiled) >= _MOST:
            self.compiled.clear()
        self.compiled[key] = self.kernel[grid](*arguments, *constants, **options)


def signature(arguments: Sequence[Any]) -> list[Any]:
    """The kinds of arguments; that of most integers without a call."""
    return [
        (0 if a % 16 else 16) if type(a) is int and 1 < a < 1 << 31 else kind(a) for a in arguments
    ]


def kind(argument: Any) -> Any:
    """All of an argument that Triton compiles for, or finer: equal kinds, equal kernels.

    >>> kind(1) == kind(17), kind(32) == kind(48), kind(3) == kind(5), kind(1 << 40) == kind(32)
    (False, True, True, False)
    """
    if type(argument) is int:
        if 1 < argument < 1 << 31:
            return 0 if argument % 16 else 16  # as in signature()
        wide = not -(1 << 31) <= argument < 1 << 31
        return 1 if argument == 1 else (argument % 16 == 0, wide, argument >= 1 << 63)
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if argument is None or isinstance(argument, (bool, float)):
        return type(argument)
    # A tensor descriptor.
    return argument.base.dtype, tuple(argument.block_shape)


@functools.lru_cache(maxsize=1)
def _rules_known() -> bool:
    import triton

    return bool(triton.__version__.startswith(_KNOWN))

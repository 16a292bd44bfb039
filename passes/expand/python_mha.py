"""The fence around the Python code of ``F.multi_head_attention_forward``, which is written down.

Called under a mode that watches torch, the function hands itself over to the mode and does nothing
else. A copy that does not ask whether there is one runs its code, of whatever version of torch.
``tests/project/test_fences.py`` says what is relied upon.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

#: What the function asks first: whether a mode, or a subclass of tensors, wants to see it whole.
ASKS = "has_torch_function"


@functools.cache
def as_python() -> Callable[..., Any]:
    """``F.multi_head_attention_forward``, which calls torch function by function."""
    original: Any = inspect.unwrap(F.multi_head_attention_forward)
    names = {**original.__globals__, ASKS: lambda _: False}
    copy = types.FunctionType(
        original.__code__, names, original.__name__, original.__defaults__, original.__closure__
    )
    copy.__kwdefaults__ = original.__kwdefaults__
    return copy

"""sparse_compile: a torch.compile backend that makes attention cost what its mask says it should.

    fast = torch.compile(model, backend="sparse_compile")
    print(sparse_compile.explain(model, *inputs))

The public names are the ones in ``__all__``; everything heavy is imported on first use.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from sparse_compile import errors
from sparse_compile.options import Options

if TYPE_CHECKING:
    from sparse_compile import patterns
    from sparse_compile.api.annotate import mask
    from sparse_compile.api.attention import attention
    from sparse_compile.api.nsa import native_sparse_attention, nsa_selection
    from sparse_compile.api.select import select
    from sparse_compile.backend import backend
    from sparse_compile.inspect.explain import explain, explain_with
    from sparse_compile.inspect.report import Report, SiteReport
    from sparse_compile.selection import Selection

__version__ = "0.1.0"
__all__ = [
    "Options",
    "Report",
    "Selection",
    "SiteReport",
    "__version__",
    "attention",
    "backend",
    "errors",
    "explain",
    "explain_with",
    "mask",
    "native_sparse_attention",
    "nsa_selection",
    "patterns",
    "select",
]

_HOMES = {
    "Report": "inspect.report",
    "Selection": "selection",
    "SiteReport": "inspect.report",
    "attention": "api.attention",
    "backend": "backend",
    "explain": "inspect.explain",
    "explain_with": "inspect.explain",
    "mask": "api.annotate",
    "native_sparse_attention": "api.nsa",
    "nsa_selection": "api.nsa",
    "select": "api.select",
}


def __getattr__(name: str) -> Any:
    if name == "patterns":
        return importlib.import_module(f"{__name__}.patterns")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps ``sparse_compile.backend`` the function when its module of the same name is imported.

    The import system sets a submodule as an attribute of its package, which would hide the public
    function behind the module that defines it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

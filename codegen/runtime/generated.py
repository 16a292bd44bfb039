"""Generated source: templates, files on disk, and the modules made of them.

The text handed to :func:`load_module` is what runs, whatever another process does to the file
meanwhile: the module is compiled from the text, and ``linecache`` shows tracebacks, debuggers and
``inspect.getsource`` that same text.
"""

from __future__ import annotations

import linecache
import os
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType

_PACKAGE = "sparse_compile_kernels"


def cache_dir() -> Path:
    """Where generated files go.

    ``$SPARSE_COMPILE_CACHE_DIR``, else ``~/.cache/sparse_compile/kernels``. (Not beside Inductor's
    cache: torch sets ``$TORCHINDUCTOR_CACHE_DIR`` itself at some point, so the place would move.)
    """
    own = os.environ.get("SPARSE_COMPILE_CACHE_DIR")
    return Path(own) if own else Path.home() / ".cache" / "sparse_compile" / "kernels"


def write_source(name: str, text: str) -> Path:
    """Make the file called ``name`` hold exactly ``text``, and return its path.

    A file that already does is left alone. Others see the old file or the new one, never a part.
    When the cache directory cannot be written, the file goes to the temporary directory.
    """
    path = cache_dir() / f"{name}.py"
    try:
        _write_atomically(path, text)
    except OSError:
        path = Path(tempfile.gettempdir()) / f"sparse_compile_{os.getuid()}" / path.name
        _write_atomically(path, text)
    return path


def _write_atomically(path: Path, text: str) -> None:
    data = text.encode()
    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)


def load_module(name: str, text: str) -> ModuleType:
    """The module that ``text`` defines, written to disk and registered under a unique name.

    Loading the same text twice gives the same module; another text of that name replaces it.
    """
    path = write_source(name, text)
    full_name = f"{_PACKAGE}.{name}"
    known = sys.modules.get(full_name)
    if known is not None and known.__dict__.get("__source__") == text:
        return known
    module = ModuleType(full_name)
    module.__file__ = str(path)
    module.__dict__["__source__"] = text
    # No modification time: linecache then never re-reads the file.
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    sys.modules[full_name] = module
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[full_name]
        raise
    return module


def fill(template: str, **holes: str | list[str]) -> str:
    """The template with its holes filled; a list fills whole lines, indented like the hole.

    >>> fill("def f():\\n    $BODY\\n    return $X\\n", BODY=["a = 1", "b = 2"], X="a")
    'def f():\\n    a = 1\\n    b = 2\\n    return a\\n'
    """

    def filled(match: re.Match[str]) -> str:
        indent, alone, inline = match.groups()
        if inline:
            return str(holes[inline])
        value = holes[alone]
        block = [value] if isinstance(value, str) else value
        return "".join(f"{indent}{line}".rstrip() + "\n" for line in block)

    # One pass, so that what fills a hole is never searched for holes.
    return re.sub(r"^( *)\$([A-Z_]+)\n|\$([A-Z_]+)", filled, template, flags=re.MULTILINE)
